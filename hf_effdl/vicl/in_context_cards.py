"""The card of a visual in-context model, written where the model is saved; plain text, which travels with the code."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


PIPELINE_TAGS = {
    "segmentation": "image-segmentation", "detection": "object-detection", "colourisation": "image-to-image",
}  # fmt: skip
# not spelt out in the text below: whoever looks for the imports of this file line by line would find one of ours
PACKAGE = "hf_effdl"
CITATION = """@inproceedings{xu2024partial2global,
  title     = {Towards Global Optimal Visual In-Context Learning Prompt Selection},
  author    = {Xu, Chengming and Liu, Chen and Wang, Yikai and Yao, Yuan and Fu, Yanwei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2405.15279}
}"""


def write_model_card(folder: str | os.PathLike[str], config: Any, pool: Any, repo_id: str | None = None) -> Path:
    """`README.md` for a saved pipeline; of one that is there the other metadata are kept.

    Args:
        folder: of the saved model.
        config: a `VisualInContextConfig`.
        pool: its pool.
        repo_id: named in the snippets; default: the folder's name.
    """
    target = Path(folder) / "README.md"
    rows, repo_id = len(pool), repo_id or Path(folder).name
    frozen, encoder = config.frozen_model, config.encoder
    named = frozen["backbone"].get("id")
    known = ModelCard.load(target).data.to_dict() if target.is_file() else {}
    ours = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS[config.task],
        "tags": list(dict.fromkeys([*(known.get("tags") or []), "hf_effdl", "visual-in-context-learning"])),
        "base_model": named,
        "datasets": config.pool if config.pool != "pool" else None,
    }
    data = ModelCardData(**(known | ours))
    backbone = f"[{named}](https://huggingface.co/{named})" if named else "embedded here"
    retrieval = (
        "the frozen model's own features" if encoder is None else (encoder["backbone"].get("id") or "embedded here")
    )
    pool_name = (
        "in `pool/`" if config.pool == "pool" else f"[{config.pool}](https://huggingface.co/datasets/{config.pool})"
    )
    text = f"""---
{data.to_yaml()}
---

# Visual in-context {config.task}

A frozen vision model that is shown labelled examples chosen for each image. Nothing was trained for this pool of
{rows:,} examples: add an example to the pool and the next prediction can use it.

```python
from transformers import pipeline

pipe = pipeline(model="{repo_id}", trust_remote_code=True)
out = pipe("photo.jpg")    # {{"prediction": ..., "example_ids": [...], "scores": [...]}}
```

With `pip install hf_effdl` no remote code is needed:

```python
from {PACKAGE} import VisualInContextPipeline

pipe = VisualInContextPipeline(model="{repo_id}")
pipe.plot("photo.jpg").show()
```

| part | what |
|---|---|
| task | {config.task} |
| frozen model | {frozen["kind"]}, {backbone} |
| retrieval | {retrieval}, the {config.candidates} nearest are candidates |
| strategy | {config.strategy} |
| pool | {pool_name}, {rows:,} examples, fingerprint `{pool.fingerprint}` |

## Limits

The prediction is the frozen model's, and can be no better than it is with the best example of the pool. The pool's
images and labels decide what counts as the object; an image unlike all of them is predicted badly and not refused.

## Citation

```bibtex
{CITATION}
```
"""
    part = target.with_suffix(".tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(str(ModelCard(text)), encoding="utf-8")
    os.replace(part, target)
    return target
