"""Labelling in rounds.

strategies    which rows to ask about next
answers       who is asked: a column, or a person with a spreadsheet
learner       the rounds
"""
