# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""How fast frozen models answer at full size, with random weights, and what the tables of papers cost at that rate.

    python examples/benchmarks/vicl_throughput.py
    python examples/benchmarks/vicl_throughput.py --device cuda --dtype bfloat16 --batch 32 --repeats 5
    python examples/benchmarks/vicl_throughput.py --models MAE-VQGAN --batch 8
    python examples/benchmarks/vicl_throughput.py --table

A pass is one query that is shown one example; `--batch` queries go in together. Models that see an image by itself
are also asked with `--examples` at once, once with everything encoded anew, once with the pool's images encoded
before: that is what a pipeline does, and its answers are the same (`kept` says how far apart they are). Models that
see example and query on one canvas from the first layer on have nothing that could be kept.

On a CPU seconds are processor time of one thread, so that other work on the machine counts little. The pictures are
noise; speed does not depend on them. Rows go to `--out`; those that are there are not made again.
"""

import time
from collections.abc import Callable, Sequence

import torch
from rows import RowFile, machine, parser_of
from transformers import (
    AutoConfig,
    Dinov2Config,
    Dinov2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    SegGptConfig,
    SegGptForImageSegmentation,
)

from hf_effdl import (
    FeatureMatching,
    MaeVqganConfig,
    MaeVqganForImageInpainting,
    MaeVqganInContext,
    PainterInContext,
    Sam2InContext,
    Sam3InContext,
    SegGptInContext,
    VisionEncoder,
)
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.frozen_model import FrozenModel


# the sizes of sam2.1-hiera-large beside those of its tiny one, transformers' defaults
LARGE = {
    "backbone_channel_list": [1152, 576, 288, 144],
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 144,
        "num_attention_heads": 2,
        "blocks_per_stage": [2, 6, 36, 4],
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": [23, 33, 43],
    },
}
WORD = {"input_ids": [49406, 5009, 49407] + 29 * [49407], "attention_mask": 3 * [1] + 29 * [0]}
# runs of the frozen model behind tables of papers; Pascal-5i has 12,604 images in its pools and 1,868 queries
TABLES = {
    "one example a query": 1_868,
    "the best of 50": 50 * 1_868,
    "a cascade: 4 x 100 x 50 labels, ten tries": 20_000 + 10 * 1_868,
    "labels of Partial2Global": 50 * 12_604,
    "jackknife of RH-Partial2Global": 45_400_000,
}


def sam3() -> FrozenModel:
    from transformers import Sam3Model  # wants torchvision, which says so itself

    return Sam3InContext(Sam3Model(AutoConfig.for_model("sam3")), tokens=WORD)


BUILD: dict[str, Callable[[], FrozenModel]] = {
    "SegGPT": lambda: SegGptInContext(SegGptForImageSegmentation(SegGptConfig())),
    "Painter": lambda: PainterInContext(SegGptForImageSegmentation(SegGptConfig(in_context_model="painter"))),
    "MAE-VQGAN": lambda: MaeVqganInContext(MaeVqganForImageInpainting(MaeVqganConfig())),
    "SAM 3": sam3,
    "SAM 2, Hiera-tiny": lambda: Sam2InContext(Sam2VideoModel(Sam2VideoConfig())),
    "SAM 2, Hiera-large": lambda: Sam2InContext(Sam2VideoModel(Sam2VideoConfig(vision_config=LARGE))),
    "DINOv2-base, matching": lambda: FeatureMatching(VisionEncoder(Dinov2Model(Dinov2Config()), image_size=224)),
}
# of minutes on a laptop; SAM 3 and the larger SAM 2 take more
DEFAULT = ("SegGPT", "Painter", "MAE-VQGAN", "SAM 2, Hiera-tiny", "DINOv2-base, matching")


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call: on a CPU processor time, else what passes until the device is done."""
    clock, wait = (time.process_time, lambda: None) if device == "cpu" else (time.perf_counter, torch.cuda.synchronize)
    if device != "cpu":
        call()  # warms up
    wait()
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return (clock() - start) / repeats


def prompts(frozen: FrozenModel, queries: int, examples: int, device: str) -> tuple[torch.Tensor, ...]:
    size = tuple(frozen.image_size)
    images = [torch.rand(queries, *more, 3, *size, device=device) for more in ((), (examples,))]
    labels = torch.zeros(queries, examples, 3, *size, device=device)
    labels[..., size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    return *images, labels


def keeps(frozen: FrozenModel) -> bool:
    """Whether an image is seen by itself."""
    return type(frozen).encode is not FrozenModel.encode


@torch.no_grad()
def measured(frozen: FrozenModel, options, case: dict) -> dict:
    """Seconds of a call, and what tells whether the answer is the same."""
    queries, images, labels = prompts(frozen, case["queries"], case["examples"], options.device)
    if not case["kept"]:
        return {"seconds": seconds(lambda: frozen(queries, images, labels), options.device, options.repeats)}
    encoded = frozen.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    took = seconds(lambda: frozen.predict(frozen.encode(queries), encoded, labels), options.device, options.repeats)
    apart = frozen.predict(frozen.encode(queries), encoded, labels) - frozen(queries, images, labels)
    return {"seconds": took, "apart": float(apart.abs().max())}


def cases(frozen: FrozenModel, options) -> list[dict]:
    found = [{"queries": options.batch, "examples": 1, "kept": False}]
    if keeps(frozen):
        found += [{"queries": 1, "examples": options.examples, "kept": kept} for kept in (False, True)]
    return found


def table(rows: list[dict]) -> None:
    lines = [
        row
        | {
            "kept": "its examples" if row["kept"] else "",
            "took": f"{row['seconds']:.3g}",
            "rate": f"{row['queries'] * row['examples'] / row['seconds']:.3g}",
        }
        for row in rows
    ]
    columns = {"model": "model", "device": "device", "dtype": "precision", "queries": "queries at once"}
    columns |= {"examples": "examples each", "kept": "encoded before", "took": "seconds", "rate": "passes a second"}
    print(markdown_table(lines, columns))
    whole = {tuple(row[name] for name in KEYS[:-1]): row["seconds"] for row in rows if not row["kept"]}
    for row in rows:
        if row["kept"] and (anew := whole.get(tuple(row[name] for name in KEYS[:-1]))) is not None:
            print(
                f"{row['model']}, {row['examples']} examples: {anew / row['seconds']:.2f} times as fast with what is "
                f"kept of them, the answers {row['apart']:.0e} apart"
            )
    best: dict[tuple, float] = {}
    for row in rows:
        if row["examples"] == 1:
            key = row["model"], row["device"], row["dtype"]
            best[key] = max(best.get(key, 0.0), row["queries"] / row["seconds"])
    costs = [
        {"model": f"{model}, {device}, {dtype}"}
        | {name: f"{runs / rate / 3600:,.1f}" for name, runs in TABLES.items()}
        for (model, device, dtype), rate in best.items()
    ]
    print("\nhours that tables of Pascal-5i take at the rate of one example, nothing kept")
    print(markdown_table(costs, {"model": "model"} | {name: f"{name} ({n:,})" for name, n in TABLES.items()}))


KEYS = ("model", "device", "dtype", "queries", "examples", "kept")


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "vicl_throughput")
    parser.add_argument("--models", nargs="*", choices=list(BUILD), default=list(DEFAULT))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", type=int, default=1, help="queries at once, of one example each")
    parser.add_argument("--examples", type=int, default=10, help="of one query, for models that keep what they saw")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, KEYS)
    for name in [] if options.table else options.models:
        torch.manual_seed(0)
        frozen = BUILD[name]().to(options.device, getattr(torch, options.dtype))
        for case in cases(frozen, options):
            key = {"model": name, "device": options.device, "dtype": options.dtype} | case
            if file.key_of(key) not in file:
                file.add(key | measured(frozen, options, case) | machine(), hide=("platform", "torch"))
    table(file.rows)


if __name__ == "__main__":
    main()
