"""The card of a repository of selections, from the `selection.json` of each."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_effdl.hub.cards import markdown_table, write_card
from hf_effdl.version import __version__


CITATION = """@article{lin2023cops,
  title   = {Optimal Sample Selection Through Uncertainty Estimation and Its Application in Deep Learning},
  author  = {Lin, Yong and Liu, Chen and Ye, Chenlu and Lian, Qing and Yao, Yuan and Zhang, Tong},
  journal = {arXiv preprint arXiv:2309.02476},
  year    = {2023},
  url     = {https://arxiv.org/abs/2309.02476}
}"""
SHOWN_CLASSES = 50
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
    card = folder / "README.md"
    metadata = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
    records = _in_order(records, metadata)
    sources = dict.fromkeys(source for record in records.values() if (source := _source(record).get("id")))
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
        DatasetCardData(**_metadata(metadata, records, list(sources), license, tags)),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        sections=sections,
        source_ids=list(sources),
        overview=markdown_table(overview, _OVERVIEW),
        version=__version__,
        first=sections[0],
        citation=CITATION,
    )


# ---- metadata


def _in_order(records: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """In the order in which they came: the first is what load_dataset(repo_id) loads and the snippets show."""
    order = [config.get("config_name") for config in metadata.get("configs") or []]

    def place(name: str) -> tuple[bool, int]:
        return name != "default", order.index(name) if name in order else len(order)

    return {name: records[name] for name in sorted(records, key=place)}


def _metadata(
    metadata: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    sources: list[str],
    license: str | None,
    tags: Iterable[str],
) -> dict[str, Any]:
    """The metadata that are there, with ours added."""
    added = {"tags": ["hf_effdl", "data-selection", *tags], "source_datasets": sources}
    merged = {key: list(dict.fromkeys([*(metadata.get(key) or []), *values])) for key, values in added.items()}
    ours = {key: values for key, values in merged.items() if values} | ({"license": license} if license else {})
    return {**metadata, **ours, "configs": _configs(records, metadata)}


def _configs(records: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `load_dataset` may be asked for: ours are made anew, others are somebody else's."""
    others = [config for config in metadata.get("configs") or [] if not _is_ours(config)]
    files = {name: f"{name}/selection.parquet" for name in records}
    files |= {(name := record["scores"]["config"]): f"{name}/scores.parquet" for record in records.values()}
    ours = [{"config_name": name, "data_files": [{"split": "train", "path": path}]} for name, path in files.items()]
    if "default" not in records and not any(config.get("default") for config in others):
        ours[0]["default"] = True
    return ours + others


def _is_ours(config: Mapping[str, Any]) -> bool:
    files = config.get("data_files")
    path = files[0].get("path") if isinstance(files, list) and files and isinstance(files[0], dict) else None
    return path in (f"{config.get('config_name')}/{name}.parquet" for name in ("selection", "scores"))


# ---- sections


def _section(name: str, record: Mapping[str, Any], picture: bool) -> dict[str, Any]:
    """What the template says of one selection."""
    info, summary, source = record["info"], record["summary"], _source(record)
    rows = _pool_rows(record) | _probe_rows(info) | _draw_rows(record)
    shown = sorted(summary["classes"], key=lambda row: -row["pool"])[:SHOWN_CLASSES]
    return {
        "name": name,
        "config": "" if name == "default" else f', config_name="{name}"',
        "recipe": summary["recipe"],
        "rows": {what: _shown(value) for what, value in rows.items() if value is not None},
        "warnings": summary["warnings"],
        "picture": f"{name}/selection.png" if picture else None,
        "classes": _class_table(shown) if shown else None,
        "more": len(summary["classes"]) - len(shown),
        "counted_by": "the label" if summary["counted_by"] == "label" else "the class that the probes vote for",
        "exact": bool(source.get("id") and (source.get("exact") or info.get("id_column"))),
        "why": source.get("why"),
        "labelled": info.get("mode") == "coreset",
        "scores": record["scores"]["config"],
    }


def _source(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record["info"].get("source") or {}


def _shown(value: Any) -> Any:
    if type(value) is float:
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else value


def _pool_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was selected from."""
    info, source = record["info"], _source(record)
    return {
        "source": source.get("id") or f"not known: {source.get('why', 'it is not recorded')}",
        "revision": source.get("revision") or ("not known" if source.get("id") else None),
        "configuration": source.get("config"),
        "split": source.get("split"),
        "rows of the pool": record["rows"],
        "fingerprint of the scored pool": source.get("fingerprint"),
        "hash of its labels": info.get("labels_hash"),
        "rows are named by": f"column `{info['id_column']}`" if info.get("id_column") else "their places, from 0",
        "labels": f"column `{info['label_column']}`" if info.get("mode") == "coreset" else "none were used",
    }


def _probe_rows(info: Mapping[str, Any]) -> dict[str, Any]:
    """Who was asked."""
    probes = info.get("probes") or {}
    rows = {"gauge of the uncertainty": info.get("gauge"), "mode": info.get("mode")}
    if not probes:
        return rows
    sample = {True: ", each on a bootstrap sample", False: ", all on the same rows"}.get(probes.get("bootstrap"), "")
    trained_on = f"{probes['training_rows']:,}{sample}" if probes.get("training_rows") else "not recorded"
    return {
        "probes": f"{probes.get('number')} x {probes.get('kind')}, fingerprint {probes.get('fingerprint')}",
        "rows the probes were trained on": trained_on,
    } | rows


def _draw_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """How rows were drawn, and what came of it."""
    settings, summary = record["settings"], record["summary"]
    return {
        "preset": settings.get("preset"),
        "noise rate": summary.get("noise_rate"),
        "regime": settings.get("regime"),
        "accuracy tried out": summary.get("trial_accuracy"),
        "rows kept by the filter": settings.get("kept_rows"),
        "score drawn by": settings.get("score"),
        "cap of the score": _cap(settings, summary.get("clip")),
        "uniform share": settings.get("uniform_share"),
        "hardest cut": settings.get("cut_hardest"),
        "quotas": settings.get("quotas"),
        "sampler": settings.get("sampler"),
        "budget": settings.get("budget"),
        "seed": str(settings.get("seed")),
        "weights": _weights(settings),
        "effective size (Kish)": f"{summary['kish']:.1f} of {summary['selected']:,} rows",
        "suspected label errors": _suspects(record["rows"], summary),
        "hf_effdl": record["info"].get("hf_effdl"),
    }


def _suspects(rows: int, summary: Mapping[str, Any]) -> str | None:
    suspects, inside = summary.get("suspect_count"), summary.get("suspects_selected")
    if suspects is None:
        return None
    return (
        f"{suspects:,} ({suspects / rows:.1%}) of the pool, {inside:,} ({inside / summary['selected']:.1%}) of the "
        "chosen"
    )


def _class_table(classes: Iterable[Mapping[str, Any]]) -> str:
    columns = {
        "class": "class",
        "pool": "pool",
        "kept": "kept by the filter",
        "selected": "chosen",
        "share": "chosen / pool",
    }
    if all(row["kept"] is None for row in classes):
        del columns["kept"]
    cells = [
        row
        | {
            "class": " ".join(row["class"].split()).replace("|", "\\|"),
            "share": None if row["share"] is None else f"{row['share']:.1%}",
        }
        for row in classes
    ]
    return markdown_table(cells, columns)


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
