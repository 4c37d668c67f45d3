"""Model and data set cards, filled from the run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

from hf_effdl.version import __version__


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


def write_card(folder: str | os.PathLike[str], template: str, data: CardData, **fields: Any) -> Path:
    """Render a template of this package into `folder/README.md`, atomically."""
    kind = DatasetCard if isinstance(data, DatasetCardData) else ModelCard
    card = kind.from_template(data, template_path=str(TEMPLATES / template), **fields)
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
    *,
    repo_id: str | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    language: str | None = None,
    license: str | None = None,
) -> Path:
    """The card of a `SplitLBITrainer` run: of the dense model with its path, or of a slim model taken from it.

    Args:
        trainer: the trainer, after training.
        folder: gets `README.md` and, where matplotlib is installed, `sparse_path.png`.
        small: the slim model the card is for; None for the dense model.
        repo_id: repository named in the loading snippet; default: `args.hub_model_id`, else the folder's name.

    The other arguments are those of `Trainer.create_model_card`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False) if small is None else small
    kind = type(model).__name__.removeprefix("FSDP")  # the class that FSDP2 makes of a model
    config = getattr(model, "config", None)
    repo_id = repo_id or trainer.args.hub_model_id or Path(folder).name
    tasks = tasks or ("image-classification" if kind.endswith("ForImageClassification") else None)
    task = tasks[0] if isinstance(tasks, list) else tasks
    report = None if small is None else getattr(config or model, "effdl_report", None)
    old = Path(folder) / "README.md"
    known = (ModelCard.load(old).data.tags or []) if old.is_file() else []
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        base_model=finetuned_from,
        pipeline_tag=task,
        tags=list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags or []), *trainer._tag_names, *known])),
    )
    path = trainer.path
    rows = _result_rows(trainer, report)
    metrics = dict.fromkeys(name for row in rows for name in row if name not in ("name", *_SIZES))
    columns = {"name": "model", **{name: name for name in metrics}, **_SIZES}
    dataset = [dataset] if isinstance(dataset, str) else list(dataset or [])
    return write_card(
        folder,
        "structure_card.md",
        data,
        title=model_name or repo_id,
        kind=kind,
        slim=small is not None,
        report=report,
        repo_id=repo_id,
        custom=getattr(config, "quantization_config", None) is not None,
        version=__version__,
        task=task,
        auto_class=_AUTO_CLASSES.get(task, kind),
        dataset=dataset,
        dataset_args=dataset_args,
        rows=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        table=markdown_table(rows, columns),
        plain_sgd=any("SGD" in row["name"] for row in rows),
        picture=_save_picture(path, report, folder),
        recipe=_recipe(trainer),
        citation=CITATION,
        growth=_growth(trainer, folder),
        support=[f"`{name}`: {int(inside.sum())} of {len(inside)}" for name, inside in path.support.items()],
    )


_SIZES = {"params": "parameters", "macs": "MACs", "latency_ms": "latency, ms"}
_AUTO_CLASSES = {"image-classification": "AutoModelForImageClassification"}
_CLOCKS = ("runtime", "per_second", "preparation_time")


def _result_rows(trainer: Any, report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows the user gave, else the last evaluations in the log; and the slim model's sizes."""
    rows = [{"name": name, **values} for name, values in trainer.results.items()]
    if not rows:
        counts = trainer.groups[0].network.count()
        logged = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
        values = {name: value for name, value in logged.items() if not any(clock in name for clock in _CLOCKS)}
        for name, prefix, other in (
            (("grown" if _has_grown(trainer) else "dense") + ", split LBI", "eval_", "eval_sparse_"),
            ("masked on the support", "eval_sparse_", "-"),
        ):
            metrics = {
                key.removeprefix(prefix): value
                for key, value in values.items()
                if key.startswith(prefix) and not key.startswith(other)
            }
            rows.append({"name": name, **metrics, **counts})
    if report is not None and not any(row.get("params") == report["params"]["after"] for row in rows):
        rows.append({"name": "slim", **{key: report[key]["after"] for key in _SIZES if key in report}})
    return rows


def _save_picture(path: Any, report: Mapping[str, Any] | None, folder: str | os.PathLike[str]) -> str | None:
    selected, order = None, (report or {}).get("order", "dual")
    if report is not None:
        # the report holds how many units of each group stayed; they are the best ones in the order it was made by
        selected = {
            name: score.topk(report["units"][name]["after"]).indices for name, score in path.scores(order).items()
        }
    try:
        figure = path.plot(selected=selected, order=order)
    except ImportError:  # matplotlib is an extra; the card says that the picture is missing
        return None
    figure.savefig(Path(folder) / "sparse_path.png", dpi=110)
    return "sparse_path.png"


def _has_grown(trainer: Any) -> bool:
    return bool(getattr(trainer, "history", None))


def _growth(trainer: Any, folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The growth history of a `GrowingTrainer`, as a table and a picture."""
    if not _has_grown(trainer):
        return None
    picture = "growth.png"
    try:
        trainer.plot_growth().savefig(Path(folder) / picture, dpi=110)
    except ImportError:
        picture = None
    return {"table": markdown_table(*trainer.growth_table()), "picture": picture}


def _recipe(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    growing = {name: getattr(args, name) for name in vars(args) if name.startswith("growth_")}
    if growing:
        growing |= {name: getattr(args, name) for name in ("max_macs", "max_params", "max_width", "widths")}
    optimizer = trainer.optimizer
    group = next(group for group in optimizer.param_groups if group["penalty"] is not None)
    of_base = {"momentum": args.momentum, "nesterov": args.nesterov}
    if args.base == "adamw":
        of_base = {"betas": group["betas"], "eps": group["eps"]}
    return {
        "preset": args.preset,
        "epochs": args.num_train_epochs,
        "batch size": args.train_batch_size * args.world_size,
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "base": args.base,
        **of_base,
        "weight decay": args.weight_decay,
        "seed": args.seed,
        "kappa": args.kappa,
        "lam": args.lam,
        "nu": round(group["nu"], 6),
        "path_scale": round(group["path_scale"], 6),
        **growing,
        "processes": args.world_size,
    }
