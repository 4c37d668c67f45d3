"""Training of the list-wise ranker, which itself travels with a model (`remote_code/modeling_listwise_ranker.py`).

ranking_lists.py     `RankingLists`: short lists of candidates with their measured performance
ranker_trainer.py    `RankerTrainer`: a `Trainer` for them, with the measures that matter for choosing
"""
