"""Which training rows are worth labelling and training on: a score a row, a draw in proportion to it, a data set.

scores/     formulas: how unsure probes are, how a row is learned, which labels are wrong
drawing/    from scores to a plan: which rows, with which probability and weight; in memory and over Parquet shards
probes/     the models that are asked, how rows are fed to them, scores of a whole pool, training dynamics recorded
language/   instruction data: adapters on a small language model as probes, scores of answers, rows within a budget
scale/      Parquet shards scored, joined and drawn from streams
rounds/     labelling in rounds
selection/  `UncertaintySelector` and `Selection`: a data set in, the chosen rows out, with report, pictures and card
"""
