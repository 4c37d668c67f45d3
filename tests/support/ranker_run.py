"""Short trainings of a list-wise ranker, for tests that run them in processes of their own.

torchrun --nproc_per_node 2 ranker_run.py POOLS OUT    # a whole run, and one resumed from its middle
"""

import sys
from pathlib import Path
from typing import Any

import torch
from leave import leave
from safetensors.torch import save_file
from scenes import make_pool
from torch import Tensor
from transformers import TrainingArguments

from hf_effdl.vicl.auto import ListwiseRanker, ListwiseRankerConfig
from hf_effdl.vicl.ranking.ranker_trainer import RankerTrainer
from hf_effdl.vicl.ranking.ranking_lists import RankingLists


COUNT, K = 24, 10


def table(pool: Any) -> tuple[Tensor, Tensor]:
    """Ten candidates of every image; an example is the better, the more its first token points where a vector does."""
    _, candidates = pool.search(pool.vectors, K, exclude=torch.arange(len(pool)))
    tokens = pool.tokens(torch.arange(len(pool)))[:, 0]
    value = tokens @ torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    value = (value - value.mean()) / value.std()
    return candidates, value.sigmoid()[candidates]


def ranking_lists(pool: Any, k: int = 4, **options: Any) -> RankingLists:
    return RankingLists(pool, *table(pool), **{"k": k, "lists_per_query": 4, "duplicates": None, **options})


def make_ranker(**changes: Any) -> ListwiseRanker:
    torch.manual_seed(0)
    return ListwiseRanker(ListwiseRankerConfig(**{"hidden_size": 16, "num_attention_heads": 2, **changes}))


def trainer(out: Any, pool: Any, processes: int = 1, **changes: Any) -> RankerTrainer:
    """18 steps of 8 lists in all, saved after the ninth."""
    options = {name: changes.pop(name) for name in ("callbacks", "compute_metrics") if name in changes}
    settings = {
        "per_device_train_batch_size": 8 // processes,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_steps": 9,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 100,
        **changes,
    }
    args = TrainingArguments(str(out), **settings)
    rest = ranking_lists(pool, rows=range(18, 24))
    lists = ranking_lists(pool, rows=range(18))
    return RankerTrainer(make_ranker(), args, train_dataset=lists, eval_dataset=rest, **options)


def weights(run: RankerTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def main() -> None:
    torch.set_num_threads(1)
    pool, out = make_pool(Path(sys.argv[1]), count=COUNT), Path(sys.argv[2])
    whole = trainer(out / "whole", pool, 2)
    whole.train()
    metrics = whole.evaluate()
    rest = trainer(out / "rest", pool, 2)
    rest.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-9"))
    numbers = {name: torch.tensor(value) for name, value in metrics.items() if name.endswith(("accuracy", "pick"))}
    rank = whole.args.process_index
    save_file({f"whole.{name}": value for name, value in weights(whole).items()} | numbers, out / f"whole.{rank}")
    save_file({f"whole.{name}": value for name, value in weights(rest).items()}, out / f"rest.{rank}")


if __name__ == "__main__":
    main()
    leave()
