"""Growing nets.

trainer.py          `GrowingTrainer`: stages of one run; arguments.py: its settings
plan.py             what grows in a round, and by how much
checkpoint.py       from a checkpoint to the grown one beside it; optimizer_state.py: the optimizer's part of that
widen.py, deepen.py more units, more blocks; new_units.py: what they start with
history.py          what every round did; picture.py: the picture of that
"""
