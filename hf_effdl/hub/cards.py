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
SELECTION_CITATION = """@article{lin2023cops,
  title   = {Optimal Sample Selection Through Uncertainty Estimation and Its Application in Deep Learning},
  author  = {Lin, Yong and Liu, Chen and Ye, Chenlu and Lian, Qing and Yao, Yuan and Zhang, Tong},
  journal = {arXiv preprint arXiv:2309.02476},
  year    = {2023},
  url     = {https://arxiv.org/abs/2309.02476}
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


# ---- selections

_OVERVIEW = {
    "link": "config",
    "selected": "rows",
    "rows": "of",
    "preset": "preset",
    "regime": "regime",
    "sampler": "sampler",
    "weights": "weights",
    "seed": "seed",
    "kish": "effective size",
    "scores": "scores",
}
_SHOWN_CLASSES = 50


def write_selection_card(
    folder: str | os.PathLike[str],
    records: Mapping[str, Mapping[str, Any]],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """The card of a repository of selections; metadata of a card that is there are kept.

    Args:
        folder: gets `README.md`; a picture is shown where `<config>/selection.png` is.
        records: the `selection.json` of every config.
        repo_id: repository named in the loading snippets; default: the folder's name.
        license, tags: added to the metadata.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.name
    known = DatasetCard.load(folder / "README.md").data.to_dict() if (folder / "README.md").is_file() else {}
    # in the order in which they came: the first is what load_dataset(repo_id) loads and the snippets show
    order = [config.get("config_name") for config in known.get("configs") or []]
    records = dict(
        sorted(
            records.items(),
            key=lambda item: (item[0] != "default", order.index(item[0]) if item[0] in order else len(order)),
        )
    )
    files = {name: f"{name}/selection.parquet" for name in records}
    files |= {(name := record["scores"]["config"]): f"{name}/scores.parquet" for record in records.values()}
    sources = dict.fromkeys(source for record in records.values() if (source := _source(record).get("id")))
    ours = {"tags": ["hf_effdl", "data-selection", *tags], "source_datasets": list(sources) or None}
    for key, values in ours.items():
        ours[key] = list(dict.fromkeys([*(known.get(key) or []), *(values or [])])) or None
    # ours are made anew; a config without a selection behind it is somebody else's
    foreign = [config for config in known.get("configs") or [] if not _is_ours(config)]
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": path}]} for name, path in files.items()]
    if "default" not in records and not any(config.get("default") for config in foreign):
        configs[0]["default"] = True
    data = DatasetCardData(
        **(
            known
            | {name: value for name, value in ours.items() if value}
            | ({"license": license} if license else {})
            | {"configs": configs + foreign}
        )
    )
    sections = [
        _section(name, record, (folder / name / "selection.png").is_file()) for name, record in records.items()
    ]
    overview = [
        record["summary"]
        | record["settings"]
        | {"link": f"`{name}`", "scores": f"`{record['scores']['config']}`", "rows": record["rows"]}
        for name, record in records.items()
    ]
    return write_card(
        folder,
        "selection_card.md",
        data,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        sections=sections,
        source_ids=list(sources),
        overview=markdown_table(overview, _OVERVIEW),
        version=__version__,
        first=sections[0],
        citation=SELECTION_CITATION,
    )


def _is_ours(config: Mapping[str, Any]) -> bool:
    files = config.get("data_files")
    path = files[0].get("path") if isinstance(files, list) and files and isinstance(files[0], dict) else None
    return path in (f"{config.get('config_name')}/{name}.parquet" for name in ("selection", "scores"))


def _source(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record["info"].get("source") or {}


def _section(name: str, record: Mapping[str, Any], picture: bool) -> dict[str, Any]:
    """What the template says of one selection."""
    info, settings, found, source = record["info"], record["settings"], record["summary"], _source(record)
    probes = info.get("probes") or {}
    sample = {True: ", each on a bootstrap sample", False: ", all on the same rows"}.get(probes.get("bootstrap"), "")
    suspects = found.get("suspect_count")
    rows = {
        "source": source.get("id") or f"not known: {source.get('why', 'it is not recorded')}",
        "revision": source.get("revision") or ("not known" if source.get("id") else None),
        "configuration": source.get("config"),
        "split": source.get("split"),
        "rows of the pool": record["rows"],
        "fingerprint of the scored pool": source.get("fingerprint"),
        "hash of its labels": info.get("labels_hash"),
        "rows are named by": f"column `{info['id_column']}`" if info.get("id_column") else "their places, from 0",
        "labels": f"column `{info['label_column']}`" if info.get("mode") == "coreset" else "none were used",
        "probes": f"{probes.get('number')} x {probes.get('kind')}, fingerprint {probes.get('fingerprint')}"
        if probes
        else None,
        "rows the probes were trained on": f"{probes['training_rows']:,}{sample}"
        if probes.get("training_rows")
        else ("not recorded" if probes else None),
        "gauge of the uncertainty": info.get("gauge"),
        "mode": info.get("mode"),
        "preset": settings.get("preset"),
        "noise rate": found.get("noise_rate"),
        "regime": settings.get("regime"),
        "accuracy tried out": found.get("trial_accuracy"),
        "rows kept by the filter": settings.get("kept_rows"),
        "score drawn by": settings.get("score"),
        "cap of the score": _cap(settings, found.get("clip")),
        "uniform share": settings.get("uniform_share"),
        "hardest cut": settings.get("cut_hardest"),
        "quotas": settings.get("quotas"),
        "sampler": settings.get("sampler"),
        "budget": settings.get("budget"),
        "seed": str(settings.get("seed")),
        "weights": _weights(settings),
        "effective size (Kish)": f"{found['kish']:.1f} of {found['selected']:,} rows",
        "suspected label errors": None
        if suspects is None
        else f"{suspects:,} ({suspects / record['rows']:.1%}) of the pool, {found['suspects_selected']:,} "
        f"({found['suspects_selected'] / found['selected']:.1%}) of the chosen",
        "hf_effdl": info.get("hf_effdl"),
    }
    classes = sorted(found["classes"], key=lambda row: -row["pool"])[:_SHOWN_CLASSES]
    shown = [
        row
        | {
            "class": " ".join(row["class"].split()).replace("|", "\\|"),
            "share": None if row["share"] is None else f"{row['share']:.1%}",
        }
        for row in classes
    ]
    columns = {
        "class": "class",
        "pool": "pool",
        "kept": "kept by the filter",
        "selected": "chosen",
        "share": "chosen / pool",
    }
    if all(row["kept"] is None for row in found["classes"]):
        del columns["kept"]
    return {
        "name": name,
        "config": "" if name == "default" else f', config_name="{name}"',
        "recipe": found["recipe"],
        "rows": {
            key: f"{value:,}" if type(value) is int else f"{value:.4g}" if type(value) is float else value
            for key, value in rows.items()
            if value is not None
        },
        "warnings": found["warnings"],
        "picture": f"{name}/selection.png" if picture else None,
        "classes": markdown_table(shown, columns) if shown else None,
        "more": len(found["classes"]) - len(shown),
        "counted_by": "the label" if found["counted_by"] == "label" else "the class that the probes vote for",
        "exact": bool(source.get("id") and (source.get("exact") or info.get("id_column"))),
        "why": source.get("why"),
        "labelled": info.get("mode") == "coreset",
        "scores": record["scores"]["config"],
    }


def _cap(settings: Mapping[str, Any], value: float | None) -> str | None:
    if value is None:
        return None if settings.get("score") in (None, "uniform") else "none"
    quantile = settings.get("clip_quantile")
    return f"{value:.6g}" + ("" if quantile is None else f", the {quantile:g} quantile of the pool")


def _weights(settings: Mapping[str, Any]) -> str | None:
    rules = {
        "p_label": "mean probability that the probes give to the row's label, plus 0.001; scaled to mean 1",
        "damped": f"1 / max({settings.get('beta')}, uncertainty); scaled to mean 1",
        "exact": "1 / inclusion probability; scaled to mean 1",
        "none": "all 1",
    }
    kind = settings.get("weights")
    return None if kind is None else f"`{kind}`: {rules[kind]}"
