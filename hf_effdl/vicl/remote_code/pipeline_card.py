"""The card of a visual in-context model, written where the model is saved; plain text, which travels with the code."""

import os
import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .writing import write_text


PIPELINE_TAGS = {
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "colourisation": "image-to-image",
    "image-to-image": "image-to-image",
}
WIDTH = 119  # of the text
INSTALL = "pip install git+https://github.com/hf-effdl/hf_effdl"  # that of version.py, which does not travel
CITATION = """@inproceedings{xu2024partial2global,
  title     = {Towards Global Optimal Visual In-Context Learning Prompt Selection},
  author    = {Xu, Chengming and Liu, Chen and Wang, Yikai and Yao, Yuan and Fu, Yanwei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2405.15279}
}"""


TEMPLATE = """---
{metadata}
---

# Visual in-context {task}

{introduction}

```python
from transformers import pipeline

pipe = pipeline(model="{repo_id}", trust_remote_code=True)
out = pipe("photo.jpg")    # {{"prediction": ..., "example_ids": [...], "scores": [...]}}
```

With `{install}` no remote code is needed:

```python
from hf_effdl import VisualInContextPipeline

pipe = VisualInContextPipeline(model="{repo_id}")
pipe.plot("photo.jpg").show()
```

| part | what |
|---|---|
| task | {task} |
| frozen model | {kind}, {backbone} |
| retrieval | {retrieval}, the {candidates} nearest are candidates |
| strategy | {strategy} |
| pool | {pool}, {rows:,} examples, fingerprint `{fingerprint}` |
{selector}
## Limits

The prediction is the frozen model's, and can be no better than it is with the best example of the pool. The pool's
images and labels decide what counts as the object; an image unlike all of them is predicted badly and not refused.

## Citation

```bibtex
{citation}
```
"""


def write_model_card(folder: str | os.PathLike[str], config: Any, pool: Any, repo_id: str | None = None) -> Path:
    """`README.md` for a saved pipeline; of one that is there the other metadata are kept.

    Args:
        folder: of the saved model.
        config: a `VisualInContextConfig`.
        pool: its pool.
        repo_id: named in the snippets; default: the folder's name.
    """
    target = Path(folder) / "README.md"
    text = TEMPLATE.format(
        metadata=_metadata(target, config).to_yaml(),
        task=config.task,
        introduction=_introduction(config.selector, len(pool)),
        repo_id=repo_id or Path(folder).name,
        kind=config.frozen_model["kind"],
        candidates=config.candidates,
        strategy=config.strategy,
        rows=len(pool),
        fingerprint=pool.fingerprint,
        selector=_selector(config),
        install=INSTALL,
        citation=CITATION,
        **_places(config),
    )
    return write_text(target, str(ModelCard(text)))


def _metadata(target: Path, config: Any) -> ModelCardData:
    known = ModelCard.load(target).data.to_dict() if target.is_file() else {}
    ours = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS[config.task],
        "tags": list(dict.fromkeys([*(known.get("tags") or []), "hf_effdl", "visual-in-context-learning"])),
        "base_model": config.frozen_model["backbone"].get("id"),
        "datasets": config.pool if config.pool != "pool" else None,
    }
    return ModelCardData(**(known | ours))


def _places(config: Any) -> dict[str, str]:
    """Where the parts are."""
    named, encoder = config.frozen_model["backbone"].get("id"), config.encoder
    backbone = f"[{named}](https://huggingface.co/{named})" if named else "embedded here"
    if encoder is None:
        retrieval = "the frozen model's own features"
    else:
        retrieval = encoder["backbone"].get("id") or "embedded here"
    pool = f"[{config.pool}](https://huggingface.co/datasets/{config.pool})"
    return {"backbone": backbone, "retrieval": retrieval, "pool": "in `pool/`" if config.pool == "pool" else pool}


def _introduction(kept: dict[str, Any] | None, rows: int) -> str:
    text = "A frozen vision model that is shown labelled examples chosen for each image. "
    new = "add an example to the pool and the next prediction can use it."
    if kept is None:
        text += f"Nothing was trained for this pool of {rows:,} examples: {new}"
    elif kept["kind"] == "ranker":
        text += f"Which of the pool's {rows:,} examples those are, a small ranker has learned: {new}"
    else:
        text += (
            f"Which of the pool's {rows:,} examples those are was learned on the pool itself: after a change of it, "
            "measure and fit again."
        )
    return _fill(text)


def _selector(config: Any) -> str:
    """The section on the selector that the model keeps; empty where there is none."""
    kept = config.selector
    if kept is None:
        return ""
    text = _cascade(kept, config.candidates) if kept["kind"] == "cascade" else _ranker(kept, config.candidates)
    default = "the default" if config.strategy == kept["kind"] else f'`strategy="{kept["kind"]}"`'
    return f"\n## How examples are chosen ({default})\n\n{text}"


def _cascade(kept: dict[str, Any], candidates: int) -> str:
    report, passes = kept["report"], kept["passes"]
    head = " Its stages are list-wise networks." if kept["head"] == "listwise" else ""
    tried, cost = "and shows it the best", "1 run"
    if passes > 1:
        tried = f"tries {passes} of them, of which the best can be expected to be best, and lets the answers decide"
        cost = f"{passes} runs"
    learned = (
        f"A `CascadeSelector` ranks the {candidates} nearest examples without the frozen model, {tried}: "
        f"{cost} of the frozen model for a prediction.{head} It learned from what examples do on {report['images']:,} "
        "images of the pool. On those, of the choice of stages that did not learn from the image itself (performance "
        "as it was measured; larger is better):"
    )
    nearest, best = report["nearest"], report["best"]
    table = ["| example | performance | gap closed |", "|---|---|---|"]
    for name, label in (
        ("nearest", "nearest"),
        ("stage 1", "stage 1, before any run of the frozen model"),
        ("stage 2", f"stage 2, after {passes}"),
        ("best tried", f"best of these {passes}"),
        ("best", "best of the candidates"),
    ):
        if name in report:
            closed = f"{(report[name] - nearest) / (best - nearest):.0%}" if best > nearest else ""
            table.append(f"| {label} | {report[name]:.4g} | {closed} |")
    fusion = (
        '`pipe(image, num_examples=10, fusion="weighted")` paints with ten examples, weighted by what is expected of '
        "them."
    )
    return "\n".join([_fill(learned), "", *table, "", _fill(fusion), ""])


def _ranker(kept: dict[str, Any], candidates: int) -> str:
    lengths = " and ".join(str(length) for length in kept["rankers"])
    passes = f", {kept['passes']} passes" if kept["passes"] > 1 else ""
    text = (
        f"A `RankerSelector` ranks the {candidates} nearest examples: list-wise rankers for lists of {lengths}, "
        f'schedule "{kept["schedule"]}"{passes}, joined by "{kept["method"]}". 1 run of the frozen model for a '
        "prediction."
    )
    if kept["reliable"]:
        text += f" Only {kept['reliable']:,} reliable examples of the pool are ranked."
    return _fill(text) + "\n"


def _fill(text: str) -> str:
    # a line that ends within a word shows a space there when it is rendered
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)
