"""Scores shards, as a script: `torchrun --nproc_per_node 2 scale_run.py FOLDER OUT [SLEEP]`; SLEEP seconds a batch.

Then draws from a stream of the same rows, split over the processes; process 0 leaves the drawn rows in OUT/drawn.json.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from datasets.distributed import split_dataset_by_node
from leave import leave
from torch import Tensor

from hf_effdl import score_shards, select_stream


COUNTS = (700, 0, 40, 300, 61)


class Lengths:
    """A scorer that knows texts by their length, and vectors of two numbers."""

    key = "lengths"

    def __init__(self, sleep: float = 0.0) -> None:
        self.sleep = sleep

    def score_rows(self, rows: Dataset, where: str = "the data", first: int = 0) -> dict[str, Tensor]:
        time.sleep(self.sleep)
        sizes = []
        for i, row in enumerate(rows):
            if row["text"] == "":
                raise ValueError(f"row {first + i} of {where} has no text")
            sizes.append(len(row["text"]))
        sizes = torch.tensor(sizes)
        return {"u_x": sizes.double() / 3, "size": sizes, "embedding": torch.stack([sizes, -sizes], 1).float()}


def shards(folder: Path, counts: tuple = COUNTS, ids: bool = True) -> list[str]:
    """Parquet files of texts, some of them empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, files, start = np.random.default_rng(0), [], 0
    names = rng.permutation(10 * sum(counts))
    for k, count in enumerate(counts):
        text = ["x" * int(size) for size in rng.integers(1, 30, count)]
        columns = {"text": pa.array(text, pa.string())}
        columns |= {"row_id": pa.array(names[start : start + count])} if ids else {}
        files.append(str(folder / f"rows-{k}.parquet"))
        pq.write_table(pa.table(columns), files[-1], row_group_size=100)
        start += count
    return files


def drawn(files: list[str], state: PartialState) -> Dataset:
    stream = load_dataset(
        "parquet", data_files=[file for file, count in zip(files, COUNTS) if count], split="train", streaming=True
    )
    part = split_dataset_by_node(stream, state.process_index, state.num_processes)
    return select_stream(part, 50, Lengths(), id_column="row_id")


if __name__ == "__main__":
    torch.set_num_threads(1)
    state, (folder, out, *sleep) = PartialState(cpu=True), sys.argv[1:]
    files = sorted(map(str, Path(folder).glob("rows-*.parquet")))
    score_shards(files, out, Lengths(float(sleep[0]) if sleep else 0.0), batch_rows=64)
    chosen = drawn(files, state)
    if state.is_main_process:
        Path(out, "drawn.json").write_text(json.dumps(chosen[:]))
    leave()
