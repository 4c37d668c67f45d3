"""Groups of units.

group.py         the noun: `Group`, its slices, and the `Network` it was found in
find.py          `find_groups`: what finders/ see on example inputs (inputs.py), each group tried out (trial.py)
counting.py      multiply-accumulates of every weight
numbers.py       whole numbers that modules keep of their units, as attributes or in their config
surgery.py       silencing and removing units in place, and the sizes that layers report
record.py        groups as plain values in files, checked when they are read
ties.py          which config numbers size which groups; slim_config.py: loading sizes that no config can say
param_groups.py  groups as torch param groups, for `SplitLBI`
"""
