"""A run in transformers' Trainer.

trainer.py     `SplitLBITrainer`: train, slim, save and push
arguments.py   `SplitLBIArguments`, and what they mean for a run of a given length
callbacks.py   `SplitLBICallback`: reports, logs, the projected model, the path beside each checkpoint
evaluation.py  the projected model, and evaluating any model of a path
card.py        the facts of the model card
"""
