"""A pool of labelled examples, as it is made; how it is read travels with a model (`remote_code/pool_reader.py`).

pool.py      `ExamplePool`: made from a data set, grown, saved, pushed, searched
rows.py      the rows of a data set as a pool takes them
writer.py    these rows become shards, each whole or absent
index.py     approximate search in large pools
card.py      the card of a pool's repository, and the commit that puts it there
"""
