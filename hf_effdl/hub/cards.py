"""Model cards, filled from the run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import hf_effdl


TEMPLATES = Path(__file__).parent / "templates"
CITATION = """@inproceedings{fu2020dessilbi,
  title     = {{DessiLBI}: Exploring Structural Sparsity of Deep Networks via Differential Inclusion Paths},
  author    = {Fu, Yanwei and Liu, Chen and Li, Donghao and Sun, Xinwei and Zeng, Jinshan and Yao, Yuan},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  url       = {https://arxiv.org/abs/2007.02010}
}"""


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps keys to headings, and a value that is missing is left blank."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) else ("" if value is None else str(value))

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_card(folder: str | os.PathLike[str], template: str, data: ModelCardData, **fields: Any) -> Path:
    """Render a template of this package into `folder/README.md`, atomically."""
    card = ModelCard.from_template(data, template_path=str(TEMPLATES / template), **fields)
    target = Path(folder) / "README.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".tmp")
    part.write_text(str(card), encoding="utf-8")
    os.replace(part, target)
    return target


def write_structure_card(
    trainer: Any,
    folder: str | os.PathLike[str],
    small: Any = None,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    repo_id: str | None = None,
) -> Path:
    """The card of a `SplitLBITrainer` run: of the dense model with its path, or of a slim model taken from it.

    Args:
        trainer: the trainer, after training.
        folder: gets `README.md` and `sparse_path.png`.
        small: the slim model the card is for; None for the dense model.
        repo_id: repository named in the loading snippet.

    The other arguments are those of `Trainer.create_model_card`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model) if small is None else small
    kind = type(model).__name__
    names = dataset or dataset_tags
    repo_id = repo_id or trainer.args.hub_model_id or str(Path(folder).name)
    task = tasks or _task(model)
    report = getattr(getattr(model, "config", model), "effdl_report", None) if small is not None else None
    custom = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    old = Path(folder) / "README.md"
    known = (ModelCard.load(old).data.tags or []) if old.is_file() else []
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    data = ModelCardData(
        language=language, license=license, library_name="transformers", model_name=model_name or repo_id,
        base_model=finetuned_from, datasets=names, pipeline_tag=task if isinstance(task, str) else None,
        tags=list(dict.fromkeys([*tags, *trainer._tag_names, *known])),
    )  # fmt: skip
    path = trainer.path
    picture = None
    try:
        figure = path.plot(selected=_kept_in(report, path) if report else None)
        figure.savefig(Path(folder) / "sparse_path.png", dpi=110)
        picture = "sparse_path.png"
    except ImportError:  # matplotlib is an extra; the card says what is missing
        pass
    columns = {"name": "model", **_metric_columns(trainer), "params": "parameters", "macs": "MACs", "latency_ms": "latency, ms"}
    return write_card(
        folder, "structure_card.md", data,
        title=model_name or repo_id, kind=kind, slim=small is not None, report=report, custom=custom, repo_id=repo_id,
        version=hf_effdl.__version__, picture=picture, task=task, datasets=[names] if isinstance(names, str) else names,
        auto_class=_auto_class(task, kind), table=markdown_table(_result_rows(trainer, small, report), columns),
        support=_support_lines(path), recipe=_recipe(trainer), stock=not custom, citation=CITATION,
        rows=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
    )  # fmt: skip


def _task(model: Any) -> str | None:
    return "image-classification" if type(model).__name__.endswith("ForImageClassification") else None


def _auto_class(task: Any, kind: str) -> str:
    return "AutoModelForImageClassification" if task == "image-classification" else kind


def _metric_columns(trainer: Any) -> dict[str, str]:
    names = dict.fromkeys(name for row in trainer.results.values() for name in row if name not in _SIZES)
    return {name: name for name in names}


_SIZES = ("params", "macs", "latency_ms")


def _result_rows(trainer: Any, small: Any, report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    for name, values in trainer.results.items():
        rows.append({"name": name, **values})
    if report is not None and not any(row.get("params") == report["params"]["after"] for row in rows):
        rows.append({"name": "slim", **{key: report[key]["after"] for key in _SIZES}})
    return rows


def _kept_in(report: Mapping[str, Any], path: Any) -> dict[str, Any]:
    """The units of a slim model as far as its report tells them: the best of each group, as many as were kept."""
    scores = path.scores()
    return {name: score.topk(report["units"][name]["after"]).indices for name, score in scores.items()}


def _support_lines(path: Any) -> list[str]:
    return [f"`{name}`: {int(inside.sum())} of {len(inside)}" for name, inside in path.support.items()]


def _recipe(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    optimizer = trainer.optimizer
    group = next(group for group in optimizer.param_groups if group["penalty"] is not None)
    return {
        "preset": args.preset, "epochs": args.num_train_epochs, "batch size": args.train_batch_size * args.world_size,
        "learning rate": args.learning_rate, "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "momentum": args.momentum, "weight decay": args.weight_decay, "seed": args.seed,
        "kappa": args.kappa, "lam": args.lam, "nu": round(group["nu"], 6), "path_scale": round(group["path_scale"], 6),
        "processes": args.world_size,
    }  # fmt: skip
