"""Scores rows of instruction data, as a script: `torchrun --nproc_per_node 2 sft_score_run.py OUT [CACHE]`.

Every process leaves the scores that it got in OUT/scores-RANK.pt.
"""

import sys

import torch
from accelerate import PartialState
from chat import conversations, llama, tokenizer
from datasets import Dataset
from leave import leave

from hf_effdl import SFTScorer


ROWS = Dataset.from_dict(conversations(20))
SETTINGS = {"part_rows": 6, "batch_tokens": 120, "top": 8}


def scorer(cache_dir: str | None = None, seeds: tuple = (0, 1, 2), **changes: object) -> SFTScorer:
    probes = [llama(seed) for seed in seeds]
    return SFTScorer(probes, tokenizer(), cache_dir=cache_dir, **SETTINGS | changes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    made = scorer(*sys.argv[2:3])
    table = made.table(made.score(ROWS))
    torch.save(table, f"{sys.argv[1]}/scores-{state.process_index}.pt")
    leave()
