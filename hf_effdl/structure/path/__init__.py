"""The path of a run.

path.py      `SparsePath`: per unit the steps of entry and exit, thresholds and norms; selection
file.py      its file, under one digest, checked when it is read
budget.py    the sizes that hold a budget: what is cut, and what comes back because it fits after all
settling.py  when a selection has stopped changing
picture.py   the picture, of plain values
"""
