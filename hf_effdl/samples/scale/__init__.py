"""Pools that lie in Parquet shards or come as streams.

scorers       probes as something that scores rows wherever they come from
score_shards  Parquet in, scores as Parquet out
join_shards   scores, or a plan, beside the rows they belong to
streams       a stream in, the chosen rows out, in one pass
"""
