"""From score columns to rows, probabilities and weights; pure, with a hash of (seed, row id) for chance.

plan, presets           `make_plan` and its three settings
draws, hashing          the samplers, and the numbers that they draw by
probabilities, quotas   scores into chances, and the budget into shares
weights, checks         weights in the loss, and what is asked of scores, budgets and tables
shards, shard_files     a plan over Parquet files that are too many to hold in memory
"""
