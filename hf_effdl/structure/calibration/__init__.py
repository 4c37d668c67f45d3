"""What a model's own inputs say of its units: how much each matters, and how the layers behind do without some.

`batches` splits the rows; `consumer` is a layer that reads units; `grams` sums up what the consumers of a group are
given; `refit` is the least squares of what is left; `scores` says who goes first; `judge` measures how far the model's
outputs have moved; `compensate` goes through the groups, layer after layer.
"""
