# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.15",
#     "datasets>=5.1",
#     "pillow>=11",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""From one process to two: what each step costs the busiest process, and what that says of more.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --table

Each step runs on the same rows in one process and in two that share them (gloo, one thread each). Counted is the
processor time of the busiest process, imports and what is made beforehand left out: it does not ask how many cores are
free, so that it can be taken on a busy machine, and a process on a core of its own takes as long, but for waiting on
the others. With T1 and T2 the times of the busiest of one and of two processes, T1 / T2 is the scale, 2 at best; what
every process does once, such as finding the groups, counts the less, the more rows there are.

  training      SplitLBITrainer, ResNet of 32 and 64 channels, 32 x 32, 64 rows a step in all; DDP joins the gradients
  scoring       UncertaintySelector.score, 8 linear heads on a ViT of 6 layers, 192 wide, 64 x 64 pixels
  linear probes LinearProbes.train on such rows; of the committed rows every process did all of it
  measuring     measure_examples, feature matching on the same ViT, 8 candidates a query

What they see is noise: no step takes longer for what is in a picture. One JSON line per run goes to `--out`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import append_rows, machine, parser_of, read_rows


# Nothing heavy is imported here: children import what they need.
ROWS = {"training": 2560, "scoring": 1024, "linear probes": 512, "measuring": 192}
WARM = {"training": 64, "scoring": 16, "linear probes": 32, "measuring": 12}
CANDIDATES = 8
GPUS, MANY = 8, 10**9


# ---- the steps: each is given a number of rows, and returns what is to be timed


def noise(rows: int, side: int) -> Any:
    import torch
    from datasets import Dataset

    pixels = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(rows))
    labels = torch.arange(rows) % 10
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "label": labels.numpy()}).with_format("torch")


def vit() -> Any:
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTModel(ViTConfig(**sizes, image_size=64, patch_size=8), add_pooling_layer=False).eval()


def training(rows: int, folder: str) -> Callable[[], Any]:
    import torch
    from accelerate import PartialState
    from transformers import ResNetConfig, ResNetForImageClassification

    from hf_effdl import SplitLBIArguments, SplitLBITrainer

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic", num_labels=10)
    processes = PartialState(cpu=True).num_processes
    options = {"per_device_train_batch_size": 64 // processes, "num_train_epochs": 1, "save_strategy": "no"}
    options |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_strategy": "no"}
    data = noise(rows, 32).rename_column("label", "labels")
    args = SplitLBIArguments(folder, **options)
    return SplitLBITrainer(ResNetForImageClassification(config), args, train_dataset=data).train


def probes(rows: int) -> Any:
    from hf_effdl import LinearProbes

    return LinearProbes.train(vit(), noise(rows, 64), input_column="pixel_values", steps=50)


def scoring(rows: int, folder: str) -> Callable[[], Any]:
    from hf_effdl import UncertaintySelector

    selector, data = UncertaintySelector(probes(32), trial=False), noise(rows, 64)
    return lambda: selector.score(data)


def linear_probes(rows: int, folder: str) -> Callable[[], Any]:
    return lambda: probes(rows)


def measuring(rows: int, folder: str) -> Callable[[], Any]:
    import numpy as np
    from accelerate import PartialState
    from datasets import Dataset
    from PIL import Image

    from hf_effdl import ExamplePool, FeatureMatching, VisionEncoder, VisualInContextModel, measure_examples

    rng = np.random.default_rng(rows)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(rows)]
    masks = [Image.fromarray(255 * (rng.random((64, 64)) < 0.5).astype(np.uint8)) for _ in range(rows)]
    encoder = VisionEncoder(vit())
    options = {"encoder": encoder, "cache_dir": folder, "progress": False, "foreground": 255}
    pool = ExamplePool.from_dataset(Dataset.from_dict({"image": images, "mask": masks}), "image", "mask", **options)
    model = VisualInContextModel.from_parts(FeatureMatching(encoder))
    PartialState().wait_for_everyone()
    return lambda: measure_examples(model, pool, candidates=CANDIDATES, progress=False)


STEPS = {"training": training, "scoring": scoring, "linear probes": linear_probes, "measuring": measuring}


# ---- one run


def child(step: str, folder: str, rows: int) -> None:
    import torch
    from accelerate import PartialState

    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    STEPS[step](WARM[step], f"{folder}/warm")()  # first passes set up what later ones find
    work = STEPS[step](rows, f"{folder}/run")
    state.wait_for_everyone()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    said = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    Path(folder, f"said-{state.process_index}.json").write_text(json.dumps(said))
    state.wait_for_everyone()
    os._exit(0)  # gloo's threads may abort while the interpreter is torn down


def run(step: str, processes: int, rows: int) -> dict[str, float]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--child", step, "--work", folder, "--rows", str(rows)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{step}, {processes} processes: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        said = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("said-*.json"))]
    busiest = max(one["cpu"] for one in said)
    return {
        "cpu_busiest": busiest,
        "cpu_all": sum(one["cpu"] for one in said),
        "wall": max(one["wall"] for one in said),
    }


# ---- what they say


def median(rows: list[dict], step: str, processes: int, key: str) -> float | None:
    values = [row[key] for row in rows if row["step"] == step and row["processes"] == processes]
    return statistics.median(values) if values else None


def table(rows: list[dict]) -> None:
    print("Processor time, median of all runs; CPU, one thread a process.")
    print("| step | rows | runs | rows a CPU second, one process | T1 / T2 | range | time of both / T1 |")
    print("|---|---|---|---|---|---|---|")
    rates = {}
    for step in STEPS:
        mine = [row for row in rows if row["step"] == step]
        one, two, both = (
            median(rows, step, *what) for what in ((1, "cpu_busiest"), (2, "cpu_busiest"), (2, "cpu_all"))
        )
        if one is None or two is None:
            continue
        count = mine[0]["rows"]
        scales = [one / row["cpu_busiest"] for row in mine if row["processes"] == 2]
        spread = f"{one / two:.2f} | {min(scales):.2f} to {max(scales):.2f}"
        print(f"| {step} | {count:,} | {len(scales)} | {count / one:.1f} | {spread} | {both / one:.2f} |")
        rates[step] = (count / one, min(1.0, max(0.0, 2 * two / one - 1)))  # T2 = T1 (whole + (1 - whole) / 2)
    print(f"\n{MANY:,} rows by these rates, arithmetic. Whole: the part of the work that both of two processes did.")
    print(f"| step | core-days | whole | days on {GPUS}, all shared | days on {GPUS}, if the whole part grows |")
    print("|---|---|---|---|---|")
    for step, (rate, whole) in rates.items():
        alone = MANY / rate / 86400
        shared, grown = alone / GPUS, alone * (whole + (1 - whole) / GPUS)
        print(f"| {step} | {alone:,.0f} | {whole:.2f} | {shared:,.0f} | {grown:,.0f} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "scaling")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--rows", type=int, help="default: of each step its own")
    parser.add_argument("--child", help="one run of a step, in the place of all")
    parser.add_argument("--work", help="folder of that run")
    options = parser.parse_args(argv)
    if options.child:
        return child(options.child, options.work, options.rows)
    rows = read_rows(options.out)
    if not options.table:
        for _ in range(options.repeats):
            for step in options.steps:
                for processes in (1, 2):
                    count = options.rows or ROWS[step]
                    load = os.getloadavg()[0]
                    row = {"step": step, "processes": processes, "rows": count, **run(step, processes, count)}
                    rows.append(row | {"load_before": load, **machine(), "threads": 1})
                    append_rows(options.out, rows[-1:])
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table(rows)


if __name__ == "__main__":
    main()
