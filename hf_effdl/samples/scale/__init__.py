"""Pools that lie in Parquet shards or come as streams.

scorers       probes as something that scores rows wherever they come from
sources       Parquet files, wherever they lie
score_shards  Parquet in, scores as Parquet out
on_ray        the same by actors of Ray Data
join_shards   scores, or a plan, beside the rows they belong to
streams       a stream in, the chosen rows out, in one pass
"""
