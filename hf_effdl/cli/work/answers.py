"""Predictions by example, as files."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from hf_effdl.cli.work.cost import Cost, rehearsal, seconds_each, tell
from hf_effdl.files import locked, write_json, write_whole
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.pipeline_visual_in_context import VisualInContextPipeline


def prompt(options: Any) -> None:
    """See the verb."""
    files = image_files(options.images)
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    pipe = VisualInContextPipeline(options.model, options.strategy, options.pool, device=device)
    if options.dry_run:
        with rehearsal() as folder:
            tell("prompt", _cost(options, pipe, files, Path(folder)))
        return
    out = Path(options.output_dir)
    answers, shown = _answered(options, pipe, files, out)
    if options.shown:
        pipe.plot(files[: options.shown], shown, path=out / "panel.png")
    columns = {"image": "image", "prediction": "prediction", "example_ids": "examples", "confidence": "confidence"}
    rows = [answer | {"example_ids": ", ".join(map(str, answer["example_ids"]))} for answer in answers]
    print(markdown_table(rows, columns))


def _answered(
    options: Any, pipe: VisualInContextPipeline, files: list[Path], out: Path, progress: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What `answers.json` says, now that it and its pictures are written; and what the panel shows."""
    given = {"num_examples": options.num_examples, "batch_size": options.batch_size}
    given |= {"candidates": options.candidates} if options.candidates else {}
    exclude = [options.exclude] * len(files) if options.exclude else None
    answers, shown = [], []
    outputs = pipe(iter(files), exclude=exclude, **given)  # as they come, since photos may be more than memory holds
    outputs = tqdm(outputs, total=len(files), desc="answering", unit=" images", disable=not progress)
    with locked(out):
        (out / "answers.json").unlink(missing_ok=True)
        for output, file, name in zip(outputs, files, _names(files, out), strict=True):
            answers.append(_written(output, file, name))
            shown += [output] if len(shown) < options.shown else []
        write_json(out / "answers.json", answers)  # last: it says which pictures are whole
    return answers, shown


def _cost(options: Any, pipe: VisualInContextPipeline, files: list[Path], folder: Path) -> Cost:
    """By two batches or more, as the first one also takes what is done once, such as trying strategies on the pool."""
    size = max(1, min(options.batch_size, len(files) // 2))
    parts = [files[start : start + size] for start in range(0, len(files) - size + 1, size)]
    first: list[float] = []

    def answer(part: list[Path]) -> None:
        start = time.perf_counter()
        _, shown = _answered(options, pipe, part, folder / f"{files.index(part[0])}", progress=False)
        if not first:
            first.append(time.perf_counter() - start)
            if options.shown:
                pipe.plot(part[: options.shown], shown, path=folder / "panel.png")

    each = seconds_each(parts, answer)
    sizes = {file: file.stat().st_size for file in folder.rglob("*.*")}
    panel = sizes.pop(folder / "panel.png", 0)
    disk = panel + sum(sizes.values()) / len([*folder.glob("[0-9]*")]) / size * len(files)
    once = max(0.0, first[0] - each)
    told = f"{len(files)} images, {size} at a time took {each:.3g} s, and the first ones {once:.3g} s more"
    return Cost(once + each / size * len(files), disk, [told])


def image_files(names: list[str]) -> list[Path]:
    """Files as they are, and all images of folders."""
    known, found = Image.registered_extensions(), []
    for path in map(Path, names):
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"--images names {path}, which is no file or folder")
    if not found:
        raise ValueError(f"--images {names}: no image among them; name files or folders of images")
    for file in found:  # what is no image is told before the work
        Image.open(file).close()
    return found


def _names(files: list[Path], out: Path) -> list[Path]:
    """A file for each prediction; images of one name in several folders are numbered."""
    stems = [file.stem for file in files]
    return [
        out / (f"{stem}.png" if stems.count(stem) == 1 else f"{stem}-{place}.png") for place, stem in enumerate(stems)
    ]


def _written(output: dict[str, Any], file: Path, target: Path) -> dict[str, Any]:
    """What `answers.json` says of an image; a picture is written beside it."""
    prediction = output["prediction"]
    if isinstance(prediction, Image.Image):
        write_whole(target, prediction.save)
        prediction = target.name
    elif getattr(prediction, "ndim", 1) == 2:
        write_whole(target, Image.fromarray(prediction * 255).save)
        prediction = target.name
    elif prediction is not None:
        prediction = [float(value) for value in prediction]
    kept = {name: output[name] for name in ("example_ids", "scores", "confidence")}
    return {"image": str(file), "prediction": prediction, **kept}
