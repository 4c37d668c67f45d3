"""Formulas, one number a row; pure.

uncertainty  how far a few probes' logits spread, and the scores that this is compared with
dynamics     how a row's prediction moves from epoch to epoch
noise        which given labels the probes doubt, and how many are wrong
numbers      what users pass as numbers, as tensors
"""
