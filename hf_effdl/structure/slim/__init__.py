"""Smaller dense models.

slim.py        `slim`: a copy without some units, and the config that says its sizes
report.py      what slimming changed; latency.py: how long a forward pass takes, side by side
family.py      models of several sizes in one repository, and `choose`
batch_norm.py  batch statistics for what is left
"""
