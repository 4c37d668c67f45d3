"""What travels with a model to the Hub: flat, since transformers copies single files, and importing siblings only.

modeling_*, configuration_*, pipeline_*    what Auto classes load; its parts, card and pictures; `writing`
frozen_*, vision_encoder, encoder_*        frozen models by one contract (`frozen_model`), encoders, `backbones`
images, visual_tasks                       what images and labels are, and how a painted answer is read and scored
pool_*, examples, strategies               a pool as it is read, as a model sees it, and simple choices
cascade_*                                  the cascade: lists, precedents, features, two stages, their fit
ranker_*                                   the list-wise ranker as a strategy: designs, aggregation, losses
"""
