# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A hundred million scores in 16 Parquet shards, a tenth of them drawn: time and memory of `plan_shards`.

    python examples/benchmarks/sampling_scale.py
    python examples/benchmarks/sampling_scale.py --table

The scores are lognormal (sigma 1.5) in float32, beside int64 row ids; the files have pyarrow's defaults, and come from
the page cache, as they were written a moment ago. Every arm runs in a fresh process, its time counts from the start of
Python, imports and all, to the last output on the disk. Beside `plan_shards`: the same draw in memory, and the usual
few lines of numpy for weighted draws without replacement (Efraimidis and Spirakis 2006), which know no probabilities.

One JSON line per finished run goes to `--out`; the table is of the runs there that have the same number of rows.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rows import append_rows, read_rows


# Nothing heavy is imported here: the peak memory of a child begins at that of its parent.
SHARE = 0.1
SEED = 0


def make(work: Path, rows: int, shards: int) -> None:
    """Writes the shards; equal from run to run."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    for k in range(shards):
        first, last = k * rows // shards, (k + 1) * rows // shards
        scores = np.random.default_rng(k).standard_normal(last - first, dtype=np.float32)
        table = pa.table({"row_id": np.arange(first, last), "u_x": np.exp(np.float32(1.5) * scores)})
        pq.write_table(table, work / f"scores-{k:05d}-of-{shards:05d}.parquet")


def shards_of(work: Path) -> list[Path]:
    return sorted(work.glob("scores-*.parquet"))


# ---- the arms: each draws `budget` rows, writes them, and returns a check to run when the clock has stopped


def plan(work: Path, budget: int) -> Callable[[], dict]:
    from hf_effdl import plan_shards

    summary = plan_shards(shards_of(work), work / "plan", budget, seed=SEED)

    def check() -> dict:
        import numpy as np
        import pyarrow.parquet as pq
        import torch

        from hf_effdl import priority_sample

        # 1 / pi estimates how many rows there are, in all and in each shard; their errors are uncorrelated
        found, variances, errors = 0, [], []
        for shard, output in zip(summary["inputs"], summary["outputs"], strict=True):
            chances = pq.read_table(work / "plan" / output["file"])["inclusion_probability"].to_numpy()
            found += len(chances)
            errors.append((1 / chances).sum() - shard["rows"])
            variances.append(((1 - chances) / chances**2).sum())
        z = [sum(errors) / sum(variances) ** 0.5, *(np.array(errors) / np.sqrt(variances))]
        # one shard alone, with two budgets
        first = shards_of(work)[0]
        table, ids = pq.read_table(first), {}
        few = max(1, int(SHARE * len(table)))
        for wanted in (few, max(1, few // 2)):
            plan_shards([first], work / f"first-{wanted}", wanted, seed=SEED)
            ids[wanted] = pq.read_table(work / f"first-{wanted}")["row_id"].to_numpy()
        scores, names = (torch.tensor(table[name].to_numpy()) for name in ("u_x", "row_id"))
        positions, _ = priority_sample(scores, few, seed=SEED, row_ids=names)
        return {
            "exact number of rows": found == budget,
            "errors of the row counts, in standard errors": [round(z[0], 2), round(max(map(abs, z)), 2)],
            "row counts within 4 standard errors": bool(max(map(abs, z)) < 4),
            "one shard equal to priority_sample": bool(np.array_equal(ids[few], names[positions].numpy())),
            "half the budget nested": bool(np.isin(ids[max(1, few // 2)], ids[few]).all()),
        }

    return check


def in_memory(work: Path, budget: int) -> Callable[[], dict]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from hf_effdl import priority_sample

    table = pq.read_table(shards_of(work))
    scores, ids = (torch.tensor(table[name].to_numpy()) for name in ("u_x", "row_id"))
    del table
    positions, inverse = priority_sample(scores, budget, seed=SEED, row_ids=ids)
    columns = {"row_id": ids[positions], "inclusion_probability": 1 / inverse, "weight": inverse / inverse.mean()}
    pq.write_table(pa.table({name: column.numpy() for name, column in columns.items()}), work / "in-memory.parquet")

    def check() -> dict:
        if not (work / "plan").is_dir():
            return {}
        files = sorted((work / "plan").glob("plan-*.parquet"))
        names = {name: pq.read_table(files, columns=[name])[name].to_numpy() for name in columns}
        return {
            "same rows as plan_shards": bool(np.array_equal(names["row_id"], columns["row_id"].numpy())),
            "largest difference of a probability": float(
                np.abs(names["inclusion_probability"] - columns["inclusion_probability"].numpy()).max()
            ),
        }

    return check


def efraimidis_spirakis(work: Path, budget: int) -> Callable[[], dict]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(shards_of(work))
    keys = np.log(np.random.default_rng(SEED).random(len(table))) / table["u_x"].to_numpy()
    positions = np.sort(np.argpartition(keys, len(keys) - budget)[len(keys) - budget :])
    pq.write_table(pa.table({"row_id": table["row_id"].to_numpy()[positions]}), work / "numpy.parquet")
    return lambda: {"exact number of rows": len(positions) == budget}


ARMS = {
    "plan_shards": plan,
    "priority_sample, in memory": in_memory,
    "Efraimidis-Spirakis, numpy, in memory": efraimidis_spirakis,
}


def run(arm: str, work: Path, budget: int) -> tuple[float, dict]:
    """An arm in a process of its own: seconds, and what the process says of itself."""
    command = [sys.executable, __file__, "--child", arm, "--work", str(work), "--budget", str(budget)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
        rest = child.stdout.read()
    if child.returncode:
        raise SystemExit(f"{arm} failed with exit code {child.returncode}")
    return seconds, json.loads(line) | {"checks": json.loads(rest)}


def child(arm: str, work: Path, budget: int) -> None:
    check = ARMS[arm](work, budget)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # ru_maxrss is in KiB on Linux, in bytes on macOS
    peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_rss_mib": peak}), flush=True)
    print(json.dumps(check()))


def table(rows: list[dict], size: int) -> None:
    print(f"{size:,} rows, {SHARE:.0%} drawn: median (range) of all runs")
    print("| arm | runs | seconds | CPU seconds | million rows/s | peak RSS, MiB |\n|---|---|---|---|---|---|")
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm and row["rows"] == size]
        if mine:
            cells = [
                f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"
                for values in ([row[key] for row in mine] for key in ("seconds", "cpu_seconds"))
            ]
            speed, peak = (
                statistics.median(row["rows_per_second"] for row in mine),
                max(row["peak_rss_mib"] for row in mine),
            )
            print(f"| {arm} | {len(mine)} | {' | '.join(cells)} | {speed / 1e6:.1f} | {peak:,.0f} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**8)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, help="a new folder for 1.5 GB of files; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampling_scale.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs so far")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child == "make":
        return make(options.work, options.rows, options.shards)
    if options.child:
        return child(options.child, options.work, options.budget)
    rows = read_rows(options.out)
    if options.table:
        return table(rows, options.rows)
    budget = int(SHARE * options.rows)
    work = Path(tempfile.mkdtemp()) if options.work is None else options.work
    if options.work is not None:
        work.mkdir(parents=True)
    try:
        sizes = ["--rows", str(options.rows), "--shards", str(options.shards)]
        subprocess.run([sys.executable, __file__, "--child", "make", "--work", str(work), *sizes], check=True)
        for _ in range(options.repeats):
            for arm in options.arms:
                if arm == "plan_shards":
                    for folder in work.glob("*/"):
                        shutil.rmtree(folder)
                load = os.getloadavg()[0]
                seconds, said = run(arm, work, budget)
                row = {
                    "arm": arm,
                    "rows": options.rows,
                    "shards": options.shards,
                    "selected": budget,
                    "seconds": seconds,
                    "rows_per_second": options.rows / seconds,
                    **said,
                    "load_before": load,
                    "platform": platform.platform(),
                    "cpus": os.cpu_count(),
                    "python": platform.python_version(),
                    "date": datetime.date.today().isoformat(),
                }
                append_rows(options.out, [row])
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                if failed := [name for name, value in said["checks"].items() if value is False]:
                    raise SystemExit(f"{arm}: {failed}")
        table(rows, options.rows)
    finally:
        if not options.keep:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
