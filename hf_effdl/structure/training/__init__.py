"""A run in transformers' Trainer.

trainer.py      `SplitLBITrainer`: train, slim, save and push
arguments.py    `SplitLBIArguments`, and what they mean for a run of a given length
callbacks.py    `SplitLBICallback`: reports, logs, the projected model, the path beside each checkpoint
settled.py      stopping once the units that a budget would keep no longer change
slimming.py     `trainer.slim`; small.py: `trainer.finetune` and `trainer.train_small`, start.py: what these go on from
distill.py      a teacher's part in the loss
evaluation.py   the projected model, and evaluating any model of a path
checkpoints.py  which checkpoint a run goes on from
card.py         the facts of the model card
"""
