"""Which labelled example a frozen vision model should be shown.

remote_code/    what travels with a model to the Hub: frozen models, encoder, strategies, ranker, cascade, pipeline
pool/           building, changing and sharing a pool of examples; `held_out.py` keeps images out of it
measure.py      how well the pool's examples do on each other
ranking/        lists and trainer for the list-wise ranker
auto.py         registers all of it with transformers' Auto classes
"""
