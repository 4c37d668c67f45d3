# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "safetensors>=0.8",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A million rows in a pool: how fast and how exact the search for 50 neighbours is, by the index and by comparing all.

    python examples/benchmarks/pool_scale.py
    python examples/benchmarks/pool_scale.py --rows 100000  # a minute
    python examples/benchmarks/pool_scale.py --table

Vectors of 768 numbers and norm 1 around 2,000 centres, whose clusters differ in size (lognormal, sigma 1): a centre of
norm 1 plus noise of norm `--noise`. They lie in 16 memory-mapped safetensors files, as the shards of a pool do; 500
more of them are the queries. Recall is the share of the 50 exact neighbours that the index finds. Making, building and
searching are processes of their own. Latencies are of one query at a time, after 20 to warm up; index and files come
from the page cache, as they were written a moment ago. Peak memory counts memory-mapped pages that were touched, which
the system can take back.

One JSON line per run goes to `--out`.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rows import append_rows, read_rows


# Nothing heavy is imported here: the peak memory of a child begins at that of its parent.
DIM, CLUSTERS, FILES, QUERIES, NEIGHBOURS, WARM = 768, 2000, 16, 500, 50, 20
EXACT_TIMED = 50
GOALS = {"recall": 0.95, "p50_ms": 20, "build_seconds": 900}


def vectors(count: int, noise: float, seed: int, part: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(CLUSTERS, DIM, generator=generator), dim=1)
    sizes = torch.randn(CLUSTERS, generator=generator).exp()
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + part)
    own = torch.multinomial(sizes, count, replacement=True, generator=generator)
    points = torch.randn(count, DIM, generator=generator).mul_(noise / DIM**0.5).add_(centres[own])
    return torch.nn.functional.normalize(points, dim=1)


def make(work: Path, options: argparse.Namespace) -> dict:
    from safetensors.torch import save_file

    for part in range(FILES):
        count = (part + 1) * options.rows // FILES - part * options.rows // FILES
        save_file({"vectors": vectors(count, options.noise, options.seed, part)}, work / f"{part:02d}.safetensors")
    return {}


def blocks_of(work: Path) -> list:
    from safetensors import safe_open

    blocks = []
    for file in sorted(work.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            blocks.append((stored.get_tensor("vectors"), None))
    return blocks


def build(work: Path, options: argparse.Namespace) -> dict:
    from hf_effdl.vicl.pool.index import build_index

    record = build_index(blocks_of(work), work / "index.faiss", "scale", seed=options.seed, progress=False).record
    size = (work / "index.faiss").stat().st_size / 2**20
    return {
        "build_seconds": record["seconds"],
        "lists": record["lists"],
        "probes": record["probes"],
        "recall_when_built": record["recall"],
        "index_mib": size,
        "faiss": record["faiss"],
    }


def search(work: Path, options: argparse.Namespace) -> dict:
    import torch

    from hf_effdl.vicl.pool.index import open_index, share_found
    from hf_effdl.vicl.remote_code.pool_search import exact_search

    queries = vectors(QUERIES, options.noise, options.seed, FILES)
    start = time.perf_counter()
    index = open_index(work / "index.faiss", "scale", options.rows, DIM)
    opened = time.perf_counter() - start

    def timed(call, some) -> list[float]:
        times = []
        for query in some.split(1):
            start = time.perf_counter()
            call(query)
            times.append(1000 * (time.perf_counter() - start))
        return sorted(times[min(WARM, len(times) - 1) :])

    times = timed(lambda query: index.search(query, NEIGHBOURS), torch.cat([queries[:WARM], queries]))
    start = time.perf_counter()
    _, found = index.search(queries, NEIGHBOURS)
    batch = 1000 * (time.perf_counter() - start) / len(queries)
    index_rss = peak()
    blocks = blocks_of(work)
    _, wanted = exact_search(blocks, queries, NEIGHBOURS)
    exact = timed(lambda query: exact_search(blocks, query, NEIGHBOURS), queries[: EXACT_TIMED + WARM])
    start = time.perf_counter()
    exact_search(blocks, queries, NEIGHBOURS)
    exact_batch = 1000 * (time.perf_counter() - start) / len(queries)
    return {
        "recall": share_found(found, wanted),
        "p50_ms": times[len(times) // 2],
        "p95_ms": times[int(0.95 * len(times))],
        "batch_ms": batch,
        "exact_p50_ms": exact[len(exact) // 2],
        "exact_p95_ms": exact[int(0.95 * len(exact))],
        "exact_batch_ms": exact_batch,
        "open_seconds": opened,
        "peak_rss_by_index_mib": index_rss,
    }


def peak() -> float:
    # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


STEPS = {"make": make, "build": build, "search": search}


def table(rows: list[dict]) -> None:
    columns = (
        "rows",
        "noise",
        "probes",
        "lists",
        "recall",
        "p50_ms",
        "p95_ms",
        "exact_p50_ms",
        "batch_ms",
        "exact_batch_ms",
        "build_seconds",
        "build_peak_rss_mib",
        "index_mib",
    )
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print(
            "| " + " | ".join(f"{row[name]:,.4g}" if name != "rows" else f"{row[name]:,}" for name in columns) + " |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--noise", type=float, default=0.7, help="norm of the noise beside a centre of norm 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a new folder for the files, 6 GB; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pool_scale.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs so far")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.step:
        said = STEPS[options.step](options.work, options)
        return print(json.dumps(said | {f"{options.step}_peak_rss_mib": peak()}))
    if options.table:
        return table(read_rows(options.out))
    work = Path(tempfile.mkdtemp()) if options.work is None else options.work
    work.mkdir(parents=True, exist_ok=options.work is None)
    row = {
        "rows": options.rows,
        "dim": DIM,
        "clusters": CLUSTERS,
        "noise": options.noise,
        "seed": options.seed,
        "queries": QUERIES,
        "threads": options.threads,
        "load_before": os.getloadavg()[0],
    }
    try:
        for step in STEPS:
            given = [f"--{name}={getattr(options, name)}" for name in ("rows", "noise", "seed")]
            command = [sys.executable, __file__, "--step", step, "--work", str(work), *given]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row |= json.loads(done.stdout)
            print(step, done.stdout, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work)
    row["goals"] = {
        "recall": row["recall"] >= GOALS["recall"],
        **{name: row[name] <= GOALS[name] for name in ("p50_ms", "build_seconds")},
    }
    row |= {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    append_rows(options.out, [row])
    table([row])


if __name__ == "__main__":
    main()
