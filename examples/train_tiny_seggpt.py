# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train a tiny SegGPT on scenes of digits: one set of weights that segments, detects and colourises by example.

    OMP_NUM_THREADS=1 python examples/train_tiny_seggpt.py --output_dir runs/tiny-seggpt

It writes a stock `SegGptForImageSegmentation` in half precision with its image processor, a picture of test scenes,
the training log and the measured numbers (`metrics.json`), among them what choosing the example is worth: see
`retrieval_protocol`. Ten to fifteen minutes on two CPU cores: one trains, one draws scenes.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from digit_scenes import SIZE, TASKS, Look, Scene, draw_scene, draw_scenes, make_pair, to_image
from PIL import Image, ImageDraw
from transformers import SegGptConfig, SegGptForImageSegmentation, SegGptImageProcessorPil, set_seed
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_effdl.cli.arguments import Options, parse_arguments, refuse_several_processes


@dataclass(kw_only=True)
class Arguments(Options):
    """How large a model, and how long it trains."""

    output_dir: str = field(default="runs/tiny-seggpt", metadata={"help": "Folder for weights, configs and log."})
    steps: int = field(default=3600, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=16, metadata={"help": "Pairs per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "AdamW's, at the peak of the cosine schedule."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "Muon's, likewise."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the training pairs and the test scenes."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the transformer."})
    layers: int = field(default=5, metadata={"help": "Number of layers."})
    heads: int = field(default=3, metadata={"help": "Number of attention heads."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch; divides the scene's 48 pixels."})
    beta: float = field(default=4.0, metadata={"help": "Where the smooth L1 loss turns from square to absolute."})
    below: float = field(default=0.3, metadata={"help": "Share of pairs with the example below the query."})
    test_pairs: int = field(default=200, metadata={"help": "Test pairs per task."})
    queries: int = field(default=100, metadata={"help": "Queries of the retrieval protocol."})
    pool: int = field(default=300, metadata={"help": "Scenes to choose an example from, in that protocol."})
    candidates: int = field(default=50, metadata={"help": "Nearest scenes that are tried as the example."})
    init: float = field(default=0.06, metadata={"help": "Standard deviation of new weights."})
    workers: int = field(default=1, metadata={"help": "Processes that draw scenes beside the training."})
    bf16: bool = field(default=True, metadata={"help": "Train in bfloat16 autocast."})
    progress_steps: int = field(default=200, metadata={"help": "Steps between two lines of progress."})


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """(n, height, width, 3) in [0, 1] to (n, 3, height, width) in ImageNet's units."""
    units = (pictures - np.array(IMAGENET_DEFAULT_MEAN)) / np.array(IMAGENET_DEFAULT_STD)
    return torch.from_numpy(units.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def build_model(args: Arguments) -> SegGptForImageSegmentation:
    config = SegGptConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        image_size=[2 * SIZE, SIZE],
        patch_size=args.patch_size,
        pretrain_image_size=2 * SIZE,
        decoder_hidden_size=16,
        merge_index=0,
        intermediate_hidden_state_indices=[args.layers // 2, args.layers - 1],
        drop_path_rate=0.0,
        initializer_range=args.init,
        beta=args.beta,
    )
    return SegGptForImageSegmentation(config)


class Pairs(torch.utils.data.Dataset):
    """Freshly drawn training pairs, the three tasks in turn: (example, query, whether the example lies below)."""

    def __init__(self, n: int, seed: int, below: float) -> None:
        self.n, self.seed, self.below = n, seed, below

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, object]:
        rng = np.random.default_rng([self.seed, i])
        task = TASKS[i % 3]
        example, query = make_pair(rng, task)
        return {"halves": [example.painting(task), query.painting(task)], "below": rng.uniform() < self.below}


@dataclass
class Canvas:
    """Collates pairs to SegGPT's inputs; the half of the query's painting is masked.

    SegGPT stacks `prompt_*` over the rest, so an example below its query takes the names of a query.
    """

    patch_size: int

    def __call__(self, rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        below = torch.tensor([bool(row["below"]) for row in rows])
        stacks = [row["halves"][::-1] if row["below"] else row["halves"] for row in rows]
        half = (SIZE // self.patch_size) ** 2
        upper, lower = below[:, None].expand(-1, half), ~below[:, None].expand(-1, half)
        images, labels = (normalise(np.stack([s[h][k] for s in stacks for h in (0, 1)])) for k in (0, 1))
        return {
            "prompt_pixel_values": images[0::2],
            "pixel_values": images[1::2],
            "prompt_masks": labels[0::2],
            "labels": labels[1::2],
            "bool_masked_pos": torch.cat([upper, lower], 1),
        }


@torch.no_grad()
def paint(
    model: SegGptForImageSegmentation,
    examples: list[tuple[np.ndarray, np.ndarray]],
    queries: list[np.ndarray],
    below: bool = False,
    batch_size: int = 50,
) -> np.ndarray:
    """The queries painted as the examples show, (n, height, width, 3): in [0, 1] but for what the model overshoots."""
    canvas = Canvas(model.config.patch_size)
    parts = []
    for i in range(0, len(queries), batch_size):
        blank = np.zeros_like(queries[0])
        rows = [
            {"halves": [example, (query, blank)], "below": below}
            for example, query in zip(examples[i : i + batch_size], queries[i : i + batch_size])
        ]
        boards = model.eval()(**canvas(rows)).pred_masks
        parts.append(boards[:, :, :SIZE] if below else boards[:, :, SIZE:])
    board = torch.cat(parts).permute(0, 2, 3, 1).numpy()
    return board * np.array(IMAGENET_DEFAULT_STD) + np.array(IMAGENET_DEFAULT_MEAN)


def iou(painted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Intersection over union of boards (n, height, width, 3), white from one half on."""
    a, b = painted.mean(-1) > 0.5, labels.mean(-1) > 0.5
    return (a & b).sum((1, 2)) / np.maximum((a | b).sum((1, 2)), 1)


def squared_error(painted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared error of each board in ImageNet's units."""
    return (((painted - labels) / np.array(IMAGENET_DEFAULT_STD)) ** 2).mean((1, 2, 3))


def test_triples(n: int, task: str, seed: int) -> list[tuple[Scene, Scene, Scene]]:
    """An example, a query, and an example with the same look for another digit of the query."""
    triples = []
    for i in range(n):
        rng = np.random.default_rng([seed, TASKS.index(task), i])
        label, look = int(rng.integers(10)), Look.draw(rng, task)
        query = draw_scene(rng, "test", label, look)
        triples.append((draw_scene(rng, "test", label, look), query, draw_scene(rng, "test", query.others[0], look)))
    return triples


def evaluate_tasks(model: SegGptForImageSegmentation, n: int = 200, seed: int = 1000) -> dict[str, float]:
    """Means over `n` test pairs of each task; any digit of a scene is its target, so only the example tells which.

    IoU of masks and of filled boxes, also where the example shows another digit of the query, which scores 0 if the
    model obeys; masks with the example below its query; the mean squared error of colours in ImageNet's units, beside
    the error of the grey picture itself.
    """
    result = {}
    for task in TASKS:
        scenes = zip(*test_triples(n, task, seed))
        examples, queries, misleading = ([scene.painting(task) for scene in part] for part in scenes)
        images, labels = [image for image, _ in queries], np.stack([label for _, label in queries])
        painted = paint(model, examples, images)
        if task == "colourisation":
            result["colourisation_mse"] = squared_error(painted, labels).mean()
            result["colourisation_mse_grey_copy"] = squared_error(np.stack(images), labels).mean()
            continue
        result[f"{task}_iou"] = iou(painted, labels).mean()
        result[f"{task}_iou_example_of_another_class"] = iou(paint(model, misleading, images), labels).mean()
        if task == "segmentation":
            result["segmentation_iou_example_below"] = iou(paint(model, examples, images, below=True), labels).mean()
    return {name: float(value) for name, value in result.items()}


def evaluate_cues(model: SegGptForImageSegmentation, n: int = 200, seed: int = 4000) -> dict[str, float]:
    """What a digit is recognised by: mask IoU where the example shares only its shape, or only its tint."""
    queries, shapes, tints = [], [], []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        label, look, other_look = int(rng.integers(10)), Look.draw(rng, TASKS[0]), Look.draw(rng, TASKS[0])
        query = draw_scene(rng, "test", label, look)
        absent = int(rng.choice([c for c in range(10) if c not in (label, *query.others)]))
        swapped = look.classes.copy()
        swapped[[label, absent]] = swapped[[absent, label]]
        queries.append(query.painting(TASKS[0]))
        shapes.append(draw_scene(rng, "test", label, other_look).painting(TASKS[0]))
        tints.append(draw_scene(rng, "test", absent, Look(swapped)).painting(TASKS[0]))
    images, labels = [image for image, _ in queries], np.stack([label for _, label in queries])
    return {
        "segmentation_iou_by_shape_alone": float(iou(paint(model, shapes, images), labels).mean()),
        "segmentation_iou_by_tint_alone": float(iou(paint(model, tints, images), labels).mean()),
    }


@torch.no_grad()
def embed(model: SegGptForImageSegmentation, images: list[np.ndarray], batch_size: int = 50) -> torch.Tensor:
    """Unit vectors (n, hidden_size) of pictures, from the model itself.

    The picture is both halves of the canvas, its label black; the mean over the lower half of the last hidden state.
    """
    black = np.zeros_like(images[0])
    parts = []
    for i in range(0, len(images), batch_size):
        batch = images[i : i + batch_size]
        pixels, labels = normalise(np.stack(batch)), normalise(np.stack([black] * len(batch)))
        states = model.eval().model(pixel_values=pixels, prompt_pixel_values=pixels, prompt_masks=labels)
        state = states.last_hidden_state
        parts.append(state[:, state.shape[1] // 2 :].mean((1, 2)))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def retrieval_protocol(
    model: SegGptForImageSegmentation,
    task: str = "segmentation",
    queries: int = 100,
    pool: int = 300,
    candidates: int = 50,
    seed: int = 2000,
    random_draws: int = 10,
) -> dict[str, float]:
    """What the choice of the example is worth: the mean score with a random one, the nearest, the best of the nearest.

    The pool's scenes show training digits, the queries test digits; only its picture tells the class of a query,
    in which the target is the largest digit. Nearest is by the inner product of `embed`. The score is the IoU, or
    minus the mean squared error in colourisation.
    """
    shelf, asked = draw_scenes(pool, "train", task, seed), draw_scenes(queries, "test", task, seed)
    shown, images = [s.painting(task) for s in shelf], [s.painting(task) for s in asked]
    similarity = embed(model, [i for i, _ in images]) @ embed(model, [i for i, _ in shown]).T
    near = similarity.topk(candidates, dim=1).indices.numpy()
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(pool, min(random_draws, pool), replace=False) for _ in asked])
    tried = np.concatenate([near, drawn], 1)
    scores = []
    for (image, label), ids in zip(images, tried):
        painted = paint(model, [shown[i] for i in ids], [image] * len(ids))
        labels = np.stack([label] * len(ids))
        scores.append(-squared_error(painted, labels) if task == "colourisation" else iou(painted, labels))
    score = np.stack(scores)
    classes = np.array([s.label for s in shelf])
    best, nearest = score[:, :candidates].max(1).mean(), score[:, 0].mean()
    return {
        "random": float(score[:, candidates:].mean()),
        "nearest": float(nearest),
        f"best of {candidates}": float(best),
        "gap": float(best - nearest),
        "nearest has the query's class": float((classes[near[:, 0]] == [s.label for s in asked]).mean()),
    }


def optimizers(model: SegGptForImageSegmentation, args: Arguments) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's layers, AdamW for everything else."""
    named = model.named_parameters()
    hidden = {name for name, p in named if p.ndim == 2 and ".layers." in name and "rel_pos" not in name}
    matrices = [p for name, p in model.named_parameters() if name in hidden]
    rest = [p for name, p in model.named_parameters() if name not in hidden]
    return [
        torch.optim.Muon(matrices, lr=args.muon_learning_rate, momentum=0.9, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(model: SegGptForImageSegmentation, args: Arguments) -> list[dict[str, float]]:
    """Trains in place, prints progress, returns the log."""
    steppers = optimizers(model, args)
    warmup = min(50, max(args.steps // 4, 1))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            stepper, lambda t: min(1, (t + 1) / warmup) * (1 + math.cos(math.pi * t / args.steps)) / 2
        )
        for stepper in steppers
    ]
    pairs = Pairs(args.steps * args.batch_size, args.seed, args.below)
    batches = torch.utils.data.DataLoader(
        pairs, args.batch_size, collate_fn=Canvas(args.patch_size), num_workers=args.workers
    )
    start, losses, log = time.monotonic(), [], []
    for step, batch in enumerate(batches, 1):
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, schedule in zip(steppers, schedules):
            stepper.step()
            stepper.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if step % args.progress_steps == 0 or step == args.steps:
            row = {"step": step, "seconds": round(time.monotonic() - start), "loss": float(np.mean(losses))}
            row |= evaluate_tasks(model, 24, seed=500)
            log.append({name: round(value, 4) for name, value in row.items()})
            print(json.dumps(log[-1]), flush=True)
            losses = []
    return log


def picture(model: SegGptForImageSegmentation, path: Path, per_task: int = 2, zoom: int = 3, seed: int = 3000) -> None:
    """Draws test pairs of each task: example, its label, query, prediction, truth."""
    lines = []
    for task in TASKS:
        for example, query, _ in test_triples(per_task, task, seed):
            shown, (image, label) = example.painting(task), query.painting(task)
            lines.append([*shown, image, paint(model, [shown], [image])[0].clip(0, 1), label])
    cell, gap, top = zoom * SIZE, 6, 16
    sheet = Image.new("RGB", (5 * (cell + gap) + gap, len(lines) * (cell + gap) + top), "white")
    for column, name in enumerate(("example", "its label", "query", "prediction", "truth")):
        ImageDraw.Draw(sheet).text((gap + column * (cell + gap), 2), name, fill="black")
        for row, line in enumerate(lines):
            tile = to_image(line[column]).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (cell + gap), top + row * (cell + gap)))
    sheet.save(path)


def save(model: SegGptForImageSegmentation, processor: SegGptImageProcessorPil, folder: Path) -> None:
    """Half precision on disk; the config asks for float32, so that loading on a CPU gives a model that runs there."""
    model.half().save_pretrained(folder)
    model.float().config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> dict[str, object]:
    (args,) = parse_arguments(sys.argv[1:] if argv is None else argv, Arguments, description=__doc__)
    refuse_several_processes("this training")
    folder = Path(args.output_dir)
    set_seed(args.seed)
    model = build_model(args)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    start = time.monotonic()
    log = train(model, args)
    seconds = time.monotonic() - start
    processor = SegGptImageProcessorPil(size={"height": SIZE, "width": SIZE}, num_labels=1)
    before = evaluate_tasks(model, args.test_pairs)
    save(model, processor, folder)
    loaded = SegGptForImageSegmentation.from_pretrained(folder)
    tasks = evaluate_tasks(loaded, args.test_pairs)
    metrics = {
        "training_seconds": round(seconds),
        "test": tasks,
        "cues": evaluate_cues(loaded, args.test_pairs),
        "largest_change_by_half_precision": max(abs(before[k] - tasks[k]) for k in tasks),
        "retrieval": {
            task: retrieval_protocol(loaded, task, args.queries, args.pool, args.candidates) for task in TASKS
        },
    }
    (folder / "metrics.json").write_text(json.dumps({"arguments": vars(args), **metrics}, indent=1) + "\n")
    picture(loaded, folder / "scenes.png")
    with open(folder / "training_log.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in log)
    print(json.dumps(metrics, indent=1))
    return metrics


if __name__ == "__main__":
    main()
