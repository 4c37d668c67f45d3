"""An approximate index for pools that are too large to compare a query with every row. Needs `faiss`."""

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_effdl.files import digest, read_json, write_whole
from hf_effdl.vicl.remote_code.pool_search import exact_search


LEAST_ROWS = 100_000
CHUNK = 2**15
# of the sample that the lists are fitted to, rows per list; faiss warns below 39
FITTED = 40
NEIGHBOURS, TRIED = 50, 200
Blocks = Sequence[tuple[Tensor, Tensor | None]]


def installed() -> bool:
    """Whether `faiss` can be imported."""
    return importlib.util.find_spec("faiss") is not None


class PoolIndex:
    """Rows in lists around centres; a search looks into the lists of the nearest centres only.

    Attributes:
        record: `fingerprint` of the pool, `rows`, `lists`, `probes`, `recall` and `seconds` of the build.
    """

    def __init__(self, index: Any, record: dict[str, Any]) -> None:
        self.index, self.record = index, record

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `exact_search`, of the rows in the lists that are looked into; row -1 where they are too few."""
        more = k if exclude is None else k + 1
        similarities, rows = map(torch.from_numpy, self.index.search(queries.contiguous().numpy(), more))
        if exclude is not None:
            # the excluded row goes last, the others keep their order
            order = (rows == exclude[:, None]).int().argsort(dim=1, stable=True)[:, :k]
            similarities, rows = similarities.gather(1, order), rows.gather(1, order)
        # of equal similarities the lower row first
        order = rows.argsort(dim=1, stable=True)
        order = order.gather(1, similarities.gather(1, order).argsort(dim=1, descending=True, stable=True))
        return similarities.gather(1, order), rows.gather(1, order)


def build_index(
    blocks: Blocks, file: Path, fingerprint: str, *, recall: float = 0.95, seed: int = 0, progress: bool = True
) -> PoolIndex:
    """Fit, fill and write an index of rows that lie in blocks (see `exact_search`); one chunk is in memory twice.

    `4 sqrt(n)` lists are fitted by spherical k-means to a sample of 40 rows per list. The number of lists to look into
    is doubled until `recall` of the 50 exact neighbours of 200 rows, themselves left out, are found.

    Args:
        blocks: the rows.
        file: where to write; a record goes beside it, last.
        fingerprint: of the pool.
        recall: share to be found, at most 1.
        seed: of the samples.
        progress: show a bar.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError('an index needs faiss: pip install "faiss-cpu>=1.9"') from error
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall} is not in (0, 1]")
    begun = time.perf_counter()
    bounds = torch.tensor([len(vectors) if kept is None else len(kept) for vectors, kept in blocks]).cumsum(0)
    rows, dim = int(bounds[-1]), blocks[0][0].shape[1]
    lists = max(1, min(round(4 * rows**0.5), rows // 39))
    generator = torch.Generator().manual_seed(seed)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical, index.cp.seed = True, seed + 1
    sample = torch.randperm(rows, generator=generator)[: FITTED * lists].sort().values
    bar = tqdm(total=rows, desc=f"index: {lists} lists", unit=" rows", disable=not progress)
    index.train(_rows_at(blocks, bounds, sample).numpy())
    for block in blocks:
        for chunk in _chunks(*block):
            index.add(chunk.contiguous().numpy())
            bar.update(len(chunk))
    bar.close()

    tried = torch.randperm(rows, generator=generator)[:TRIED]
    reached = _open_lists(index, _rows_at(blocks, bounds, tried), blocks, tried, recall)
    record = {
        "fingerprint": fingerprint,
        "rows": rows,
        "dim": dim,
        "lists": lists,
        "probes": index.nprobe,
        "recall": reached,
        "seed": seed,
        "faiss": faiss.__version__,
    }
    write_whole(file, lambda part: faiss.write_index(index, str(part)))
    record["sha256"] = digest(file)
    record["seconds"] = time.perf_counter() - begun
    write_whole(file.with_suffix(".json"), json.dumps(record))
    return PoolIndex(index, record)


def _open_lists(index: Any, queries: Tensor, blocks: Blocks, own: Tensor, recall: float) -> float:
    """Have an index look into so many lists as the recall takes; returns the recall that is reached."""
    k = min(NEIGHBOURS, index.ntotal - 1)
    _, wanted = exact_search(blocks, queries, k, own)
    index.nprobe = 1
    while True:
        _, found = PoolIndex(index, {}).search(queries, k, own)
        reached = share_found(found, wanted)
        if reached >= recall or index.nprobe >= index.nlist:
            return reached
        index.nprobe = min(2 * index.nprobe, index.nlist)


def open_index(file: Path, fingerprint: str, rows: int, dim: int) -> PoolIndex | None:
    """The index in a file, its lists memory-mapped; None where there is none for this very pool."""
    try:
        record = read_json(file.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or any(
        record.get(name) != value for name, value in {"fingerprint": fingerprint, "rows": rows, "dim": dim}.items()
    ):
        return None
    import faiss

    try:
        if "sha256" in record and digest(file) != record["sha256"]:  # version 0.1 kept none
            return None
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except (OSError, RuntimeError):  # absent, or cut off
        return None
    return PoolIndex(index, record) if (index.ntotal, index.d) == (rows, dim) else None


def share_found(found: Tensor, wanted: Tensor) -> float:
    """Mean share of each query's wanted rows that are among the found ones; both `(B, k)`."""
    return (wanted[:, :, None] == found[:, None]).any(2).float().mean().item()


def _chunks(vectors: Tensor, kept: Tensor | None) -> Sequence[Tensor]:
    if kept is None:
        return vectors.split(CHUNK)
    return [vectors[some] for some in kept.split(CHUNK)]


def _rows_at(blocks: Blocks, bounds: Tensor, rows: Tensor) -> Tensor:
    """Copies of rows by their number over all blocks."""
    found = torch.empty(len(rows), blocks[0][0].shape[1])
    where = torch.bucketize(rows, bounds, right=True)
    for number in where.unique().tolist():
        vectors, kept = blocks[number]
        here = where == number
        local = rows[here] - (int(bounds[number - 1]) if number else 0)
        found[here] = vectors[local if kept is None else kept[local]]
    return found
