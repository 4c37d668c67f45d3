"""Model and data set cards, filled from the run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard

from hf_effdl.files import write_whole
from hf_effdl.version import __version__


TEMPLATES = Path(__file__).parent / "templates"
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
    return write_whole(Path(folder) / "README.md", str(card))


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
