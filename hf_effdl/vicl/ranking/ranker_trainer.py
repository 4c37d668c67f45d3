"""`RankerTrainer`: a `Trainer` for list-wise rankers, with the measures that matter for choosing examples."""

from functools import wraps
from inspect import signature
from typing import Any

import numpy as np
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from hf_effdl.processes import refuse_lone_processes
from hf_effdl.vicl.ranking.ranking_lists import RankingLists
from hf_effdl.vicl.remote_code.modeling_listwise_ranker import ListwiseRanker


def ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """How good the first of each list is, and how often a pair stands in the right order.

    Args:
        prediction: scores `(N, k)` as predictions, performance `(N, k)` as label_ids.

    Returns:
        list_accuracy: share of lists whose highest score is on one of the best items;
        pair_accuracy: share of the pairs of different performance that the scores put in order, a tie for half;
        pick, random, best: mean performance of the item with the highest score, of any, and of the best.

    Example:
        >>> ranking_metrics(EvalPrediction(np.array([[2.0, 1.0, 0.0]]), np.array([[0.25, 0.5, 0.0]])))["pick"]
        0.25
    """
    scores, metric = prediction.predictions, prediction.label_ids
    pick = np.take_along_axis(metric, scores.argmax(1)[:, None], 1)[:, 0]
    i, j = np.triu_indices(metric.shape[1], 1)
    predicted_order, true_order = np.sign(scores[:, i] - scores[:, j]), np.sign(metric[:, i] - metric[:, j])
    right = (1 + predicted_order * true_order)[true_order != 0] / 2
    return {
        "list_accuracy": float((pick == metric.max(1)).mean()),
        "pair_accuracy": float(right.mean()) if right.size else 1.0,
        "pick": float(pick.mean()),
        "random": float(metric.mean()),
        "best": float(metric.max(1).mean()),
    }


class RankerTrainer(Trainer):
    """A `Trainer` that trains a `ListwiseRanker` on `RankingLists`.

    All arguments are those of `Trainer`. Without `args`, they are the paper's: AdamW, constant learning rate 5e-5, no
    weight decay, 64 lists a step. The list length and the fingerprints of the training lists' pool and encoder are put
    into the ranker's config. Evaluation measures `ranking_metrics`; to stop early, evaluate lists of other queries:

        args = TrainingArguments("ranker", per_device_train_batch_size=64, lr_scheduler_type="constant",
                                 num_train_epochs=80, eval_strategy="epoch", save_strategy="epoch",
                                 load_best_model_at_end=True, metric_for_best_model="list_accuracy")
        RankerTrainer(ranker, args, train_dataset=train, eval_dataset=other,
                      callbacks=[EarlyStoppingCallback(5)]).train()

    Raises:
        TypeError: for another kind of model.
        ValueError: for lists of another encoder than the ranker's, or with labels that it does not look at.

    Source: arXiv 2405.15279, section 4.
    """

    _tag_names = ["hf_effdl", "listwise-ranker"]

    @wraps(Trainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        del given["self"]
        if given.get("args") is None:
            given["args"] = TrainingArguments(
                "trainer_output",
                per_device_train_batch_size=64,
                per_device_eval_batch_size=64,
                lr_scheduler_type="constant",
            )
        if given.get("compute_metrics") is None:
            given["compute_metrics"] = ranking_metrics
        super().__init__(**given)
        refuse_lone_processes()
        if not isinstance(self.model, ListwiseRanker):
            raise TypeError(f"model is a {type(self.model).__name__}: RankerTrainer trains a ListwiseRanker")
        if self.args.label_names is None:
            # upstream takes every argument with "label" in its name for a target, and the candidates' labels are not
            self.label_names = ["metric"]
        train, evaluation = given.get("train_dataset"), given.get("eval_dataset")
        for lists in [*(evaluation.values() if isinstance(evaluation, dict) else [evaluation]), train]:
            if isinstance(lists, RankingLists):
                self._check(lists)
        if isinstance(train, RankingLists):
            config = self.model.config
            config.list_length, config.pool_fingerprint = train.k, train.pool_fingerprint
            config.encoder_fingerprint = train.encoder_fingerprint
            if config.encoder is None:  # so that pixels find it
                config.encoder = dict(train.pool.encoder)

    def _check(self, lists: RankingLists) -> None:
        self.model.check_tokens(lists.pool.dim, lists.encoder_fingerprint)
        if lists.has_labels and self.model.config.label_channels is None:
            raise ValueError(
                "the lists hold the candidates' labels, and this ranker does not look at labels (config.label_channels"
                "=None, as with legacy=True): make them with labels=False"
            )
