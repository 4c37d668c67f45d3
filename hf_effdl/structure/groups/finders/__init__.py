"""Where groups are looked for, before each is tried out.

flow.py    records one forward pass so that autograd says which outputs of a layer reach which inputs of the next
blocks.py  FFN neurons, attention heads and key/value groups, from that
counts.py  the numbers of heads that attention modules keep
trace.py   convolutional networks, by Torch-Pruning's dependency graph
"""
