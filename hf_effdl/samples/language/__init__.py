"""Choosing instruction data by what a few language models say of the answers.

rows      texts, pairs and conversations as tokens
probes    adapters on a small model, trained on bootstrap samples
scorer    the pass over the data, and the selection
choosing  damaged rows, near copies, and what other methods would choose from the same scores
"""
