"""Predictions by example, as files."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from hf_effdl.files import filled_beside, locked, write_json
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.images import to_rgb
from hf_effdl.vicl.remote_code.pipeline_visual_in_context import VisualInContextPipeline


def prompt(options: Any) -> None:
    """See the verb."""
    files = image_files(options.images)
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    pipe = VisualInContextPipeline(options.model, options.strategy, options.pool, device=device)
    given = {"num_examples": options.num_examples, "batch_size": options.batch_size}
    given |= {"candidates": options.candidates} if options.candidates else {}
    images = [to_rgb(Image.open(file)) for file in files]
    exclude = [options.exclude] * len(images) if options.exclude else None
    outputs = pipe(images, exclude=exclude, **given)
    out = Path(options.output_dir)
    with locked(out), filled_beside(out) as scratch:
        targets = _names(files, scratch)
        answers = [_written(output, file, name) for output, file, name in zip(outputs, files, targets, strict=True)]
        write_json(scratch / "answers.json", answers)
    if options.shown:
        pipe.plot(images[: options.shown], outputs[: options.shown], path=out / "panel.png")
    columns = {"image": "image", "prediction": "prediction", "example_ids": "examples", "confidence": "confidence"}
    shown = [answer | {"example_ids": ", ".join(map(str, answer["example_ids"]))} for answer in answers]
    print(markdown_table(shown, columns))


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
        raise ValueError(f"--images {names}: no image among them")
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
        prediction.save(target)
        prediction = target.name
    elif getattr(prediction, "ndim", 1) == 2:
        Image.fromarray(prediction * 255).save(target)
        prediction = target.name
    elif prediction is not None:
        prediction = [float(value) for value in prediction]
    kept = {name: output[name] for name in ("example_ids", "scores", "confidence")}
    return {"image": str(file), "prediction": prediction, **kept}
