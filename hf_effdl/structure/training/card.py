"""The card of a `SplitLBITrainer` run: of the dense model with its path, or of a slim model taken from it."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_effdl.files import write_whole
from hf_effdl.hub.cards import markdown_table, write_card
from hf_effdl.hub.eval_results import write_eval_results
from hf_effdl.structure.groups.finders.lora import has_adapter
from hf_effdl.structure.lora.picture import plot_lora_ranks, rank_table
from hf_effdl.structure.path.path import SparsePath
from hf_effdl.structure.slim.report import checked_report
from hf_effdl.version import __version__


CITATION = """@inproceedings{fu2020dessilbi,
  title     = {{DessiLBI}: Exploring Structural Sparsity of Deep Networks via Differential Inclusion Paths},
  author    = {Fu, Yanwei and Liu, Chen and Li, Donghao and Sun, Xinwei and Zeng, Jinshan and Yao, Yuan},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  url       = {https://arxiv.org/abs/2007.02010}
}"""
SIZES = {"params": "parameters", "macs": "MACs", "latency_ms": "latency, ms"}
AUTO_CLASSES = {"image-classification": "AutoModelForImageClassification"}
CLOCKS = ("runtime", "per_second", "preparation_time")
PICTURE = "sparse_path.png"
RANKS_PICTURE = "lora_ranks.png"
REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")  # what the Hub takes for the name of a data set


def write_structure_card(
    trainer: Any,
    folder: str | os.PathLike[str],
    small: Any = None,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    family: Sequence[str] = (),
    family_picture: str | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    language: str | None = None,
    license: str | None = None,
    benchmark: Mapping[str, str] | None = None,
) -> Path:
    """Write `README.md` and, where matplotlib is installed, `sparse_path.png` into a folder.

    Args:
        trainer: a `SplitLBITrainer` after training; its `card_facts` say what its kind of training adds.
        folder: made where it does not exist.
        small: the slim model the card is for; None for the dense model.
        repo_id: repository named in the loading snippet; default: `args.hub_model_id`, else the folder's name.
        revision: of it, that the slim model is in; default: its main branch.
        family: revisions of all sizes there, where the card is for all of them, and `family_picture`: of their curve.
        benchmark: `{metric: task id}`, where the one `dataset` is a benchmark of the Hub (its `eval.yaml` names the
            tasks) and was evaluated as it asks: each goes into a file of `.eval_results` beside the card.

    The other arguments are those of `Trainer.create_model_card`.

    Raises:
        ValueError, TypeError: for a benchmark that has no such data set or metric.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False) if small is None else small
    kind = type(model).__name__.removeprefix("FSDP")  # the class that FSDP2 makes of a model
    config = getattr(model, "config", None)
    repo_id = repo_id or trainer.args.hub_model_id or Path(folder).name
    tasks = tasks or ("image-classification" if kind.endswith("ForImageClassification") else None)
    task = tasks[0] if isinstance(tasks, list) else tasks
    metrics = _metrics_of(trainer, small, revision or next(iter(family), None))
    told = _benchmark_values(benchmark, _listed(dataset), metrics)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        base_model=finetuned_from,
        pipeline_tag=task,
        datasets=[name for name in _listed(dataset) if REPO.fullmatch(name)] or None,
        **_model_index(model_name or repo_id, task, _listed(dataset), metrics),
        tags=list(dict.fromkeys([*_listed(tags), *trainer._tag_names, *_tags_there(Path(folder) / "README.md")])),
    )
    facts = trainer.card_facts(folder)
    report = _report_of(small)
    if told:
        notes = f"{report['macs']['ratio']:.0%} of the MACs" if report and "macs" in report else None
        write_eval_results(folder, *_listed(dataset), told, source=f"https://huggingface.co/{repo_id}", notes=notes)
    shared = {
        "title": model_name or repo_id,
        "repo_id": repo_id,
        "version": __version__,
        "task": task,
        "dataset": _listed(dataset),
        "dataset_args": dataset_args,
        "rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "recipe": _recipe(trainer, facts["recipe"] | _of_small_net(report or {})),
        "citation": CITATION,
    }
    if has_adapter(model):
        data.library_name = "peft"
        data.base_model = _base_of(data, config)
        return write_card(folder, "lora_card.md", data, **shared, **_adapter_facts(trainer, small, data, folder))
    return write_card(
        folder,
        "structure_card.md",
        data,
        kind=kind,
        slim=small is not None,
        report=report,
        revision=revision,
        family=list(family),
        family_picture=family_picture,
        custom=getattr(config, "quantization_config", None) is not None,
        auto_class=AUTO_CLASSES.get(task, kind),
        growth=facts["growth"],
        **shared,
        **_results(trainer, report, facts["whole"]),
        **_path_facts(trainer.path, report, folder),
    )


def _report_of(small: Any) -> Mapping[str, Any] | None:
    """What a slim model says of itself, in its config where that is its own; None for the dense one."""
    config = getattr(small, "config", None) if small is not None and not has_adapter(small) else None
    return checked_report(getattr(config or small, "effdl_report", None))


def _base_of(data: ModelCardData, config: Any) -> str | None:
    return data.base_model or getattr(config, "name_or_path", None) or None


def _listed(values: str | list[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else list(values or [])


def _tags_there(card: Path) -> list[str]:
    return (ModelCard.load(card).data.tags or []) if card.is_file() else []


# ---- results


def _metrics_of(trainer: Any, small: Any, name: str | None) -> Mapping[str, float]:
    """What a slim model has reached: in the results by its name, else what this trainer measured last of its size."""
    if small is None:
        return {}
    row = trainer.results.get(name or "slim")
    if row is None and (report := _report_of(small)) is not None:
        size = report["params"]["after"]
        row = next((row for row in reversed(trainer.measured.values()) if row.get("params") == size), None)
    return {key: value for key, value in (row or {}).items() if key not in SIZES and isinstance(value, float)}


def _benchmark_values(
    benchmark: Mapping[str, str] | None, datasets: Sequence[str], metrics: Mapping[str, float]
) -> dict[str, float]:
    """The values by task ids."""
    if benchmark is None:
        return {}
    if not isinstance(benchmark, Mapping) or not all(
        isinstance(part, str) for pair in benchmark.items() for part in pair
    ):
        raise TypeError(f"benchmark={benchmark!r}: pass {{metric: task id}}, the ids as in the data set's eval.yaml")
    if len(datasets) != 1 or not REPO.fullmatch(datasets[0]) or "/" not in datasets[0]:
        raise ValueError(
            f"benchmark= is of one data set of the Hub, owner/name, and dataset={list(datasets)}: pass it"
        )
    if missing := [name for name in benchmark if name not in metrics]:
        raise ValueError(
            f"benchmark= names {missing}, and what was measured of this model is {sorted(metrics)}: name one of these"
        )
    return {task: metrics[name] for name, task in benchmark.items()}


def _model_index(name: str, task: str | None, datasets: Sequence[str], metrics: Mapping[str, float]) -> dict:
    """What a card's data say of results: those of a model on one data set, where both are known."""
    if len(datasets) != 1 or not task or not metrics:
        return {}
    data = {"task_type": task, "dataset_type": datasets[0], "dataset_name": datasets[0]}
    results = [EvalResult(**data, metric_type=key, metric_value=value) for key, value in metrics.items()]
    return {"model_name": name, "eval_results": results}


def _results(trainer: Any, report: Mapping[str, Any] | None, whole: str) -> dict[str, Any]:
    """The table of results, and whether plain SGD is in it."""
    told = trainer.results or trainer.measured
    rows = [{"name": name, **values} for name, values in told.items()] or logged_rows(trainer, whole)
    if report is not None and report["params"]["after"] not in [row.get("params") for row in rows]:
        rows.append({"name": "slim", **{key: report[key]["after"] for key in SIZES if key in report}})
    table = markdown_table(rows, {"name": "model", **_metric_names(rows), **SIZES})
    return {"table": table, "plain_sgd": any("SGD" in row["name"] for row in rows)}


def _metric_names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {name: name for row in rows for name in row if name not in ("name", *SIZES)}


def logged_rows(trainer: Any, whole: str) -> list[dict[str, Any]]:
    """The last evaluation in the log, of the whole net and of the projected one, with the net's size."""
    counts = trainer.groups[0].network.count()
    logged = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    values = {name: value for name, value in logged.items() if not any(clock in name for clock in CLOCKS)}
    masked = _without_prefix(values, "eval_sparse_")
    others = {name: value for name, value in values.items() if not name.startswith("eval_sparse_")}
    return [
        {"name": f"{whole}, split LBI", **_without_prefix(others, "eval_"), **counts},
        {"name": "masked on the support", **masked, **counts},
    ]


def _without_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


# ---- the path


def _path_facts(path: SparsePath, report: Mapping[str, Any] | None, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The support in words, and the picture, drawn into the folder; none without matplotlib."""
    lines = [f"`{name}`: {int(inside.sum())} of {len(inside)}" for name, inside in path.support.items()]
    selected, order = None, (report or {}).get("order", "dual")
    if report is not None:
        # the report holds how many units of each group stayed; they are the best ones in the order it was made by
        selected = {
            name: score.topk(report["units"][name]["after"]).indices for name, score in path.scores(order).items()
        }
    try:
        save = path.plot(selected=selected, order=order).savefig
    except ImportError:  # matplotlib is an extra; the card says that the picture is missing
        return {"support": lines, "picture": None}
    write_whole(Path(folder) / PICTURE, partial(save, dpi=110))
    return {"support": lines, "picture": PICTURE}


# ---- adapters


def _adapter_facts(trainer: Any, small: Any, data: ModelCardData, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of results and of ranks, and the picture."""
    report = None if small is None else getattr(small, "effdl_report", None)
    rows = [{"name": name, **values} for name, values in trainer.results.items()]
    if not rows:
        rows = logged_rows(trainer, "all ranks")
        for row in rows:
            row |= {"params": sum(group.units * group.params for group in trainer.groups), "macs": None}
    if report is not None and report["params"]["after"] not in [row.get("params") for row in rows]:
        rows.append({"name": "this adapter", "params": report["params"]["after"]})
    ranks = {name: int(inside.sum()) for name, inside in trainer.path.support.items()}
    if report is not None:
        ranks = {name: pair["after"] for name, pair in report["units"].items()}
    kinds, layers = rank_table(ranks)
    try:
        save = plot_lora_ranks(trainer.path, ranks).savefig
        picture = write_whole(Path(folder) / RANKS_PICTURE, partial(save, dpi=110)).name
    except ImportError:
        picture = None
    return {
        "report": report,
        "base": data.base_model,
        "table": markdown_table(rows, {"name": "adapter", **_metric_names(rows), "params": "parameters"}),
        "ranks": markdown_table(layers, {"layer": "layer", **{kind: f"`{kind}`" for kind in kinds}}),
        "picture": picture,
    }


# ---- settings


def _of_small_net(report: Mapping[str, Any]) -> dict[str, Any]:
    """How a slim model was trained since, as its report has it."""
    lines: dict[str, Any] = {}
    if search := report.get("search"):
        settled = "" if search["settled"] else ", not settled"
        lines["units cut at step"] = f"{search['step']} of {search['of']}{settled}"
    if tuned := report.get("tuned"):
        lines["small net, steps"] = tuned["steps"]
        lines["small net, learning rate"] = tuned["learning_rate"]
        lines["small net, teacher's share"] = tuned["distill"]
    return lines


def _recipe(trainer: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    args = trainer.args
    group = next(group for group in trainer.optimizer.param_groups if group["penalty"] is not None)
    of_base = {"momentum": args.momentum, "nesterov": args.nesterov}
    if args.base == "adamw":
        of_base = {"betas": group["betas"], "eps": group["eps"]}
    return {
        "preset": args.preset,
        "path starts": group["start"],
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
        **more,
        "processes": args.world_size,
    }
