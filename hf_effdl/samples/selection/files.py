"""Selections as files, in a folder or in a data set repository on the Hub: Parquet and JSON, nothing else.

`<config>/selection.json`: what was chosen from what, and how; `<config>/selection.parquet`: `row_id`, `weight`,
`inclusion_probability` and scores of the chosen rows; `scores/scores.parquet`: `row_id` and scores of every row of the
pool, shared by all configs that were made from them, and `scores/scores.sha256`, its digest. On the Hub also
`README.md`, the card, and `<config>/selection.png`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RemoteEntryNotFoundError

from hf_effdl.files import check_folder, damaged, locked, plain, read_json, sweep, write_whole
from hf_effdl.files import digest as digest_of
from hf_effdl.hub.repos import own_dataset_repo
from hf_effdl.processes import is_first
from hf_effdl.samples.drawing.plan import Plan
from hf_effdl.samples.selection.card import write_selection_card
from hf_effdl.samples.selection.findings import clip_value, suspect_positions
from hf_effdl.samples.selection.pictures import plot_overview
from hf_effdl.samples.selection.report import SelectionReport
from hf_effdl.samples.selection.rows import SelectedRows


FORMAT = 1
MARK, DRAWN_BY = "row_mark", "drawn_by"
RECORD, CHOSEN, SCORES, PICTURE = "selection.json", "selection.parquet", "scores.parquet", "selection.png"
SCORES_DIGEST = "scores.sha256"
# what the records of the first version hold, which had no digest of the whole
EARLIER = {"format", "settings", "info", "names", "rows", "named_rows", "digest", "scores", "summary"}
REMEDY = "remove it, and save or push the selection again"
APART = "its files do not belong together, as after a write that was cut off"
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def save(
    selection: SelectedRows, folder: str | os.PathLike[str], config_name: str = "default", card: bool = False
) -> Path:
    """Write one config into a folder beside those it has, and their card if asked; returns the config's folder."""
    if not re.fullmatch(NAME, config_name) or re.match(r"scores\b", config_name):
        raise ValueError(
            f"config_name={config_name!r}: use letters, digits and . _ -, and not 'scores', which is the "
            "name of the scores of all rows"
        )
    chosen, scores = selection.to_dataset(), selection.scores_dataset()
    if selection.row_ids is None and (marked := selection.row_marks()) is not None:
        scores = scores.add_column(MARK, marked[0].numpy())
    if selection.drawn_by is not None:
        scores = scores.add_column(DRAWN_BY, selection.drawn_by.numpy())
    with locked(folder):
        return _write(selection, folder, config_name, card, chosen, scores)


def _write(
    selection: SelectedRows,
    folder: str | os.PathLike[str],
    config_name: str,
    card: bool,
    chosen: Dataset,
    scores: Dataset,
) -> Path:
    """Write one config's files; no one else may be writing into the folder."""
    scores_by_config = {name: record["scores"] for name, record in records(folder).items()}
    record = {
        "format": FORMAT,
        "settings": selection.plan.settings,
        "info": {name: value for name, value in selection.info.items() if name != "settings"},
        "names": None if selection.names is None else list(selection.names),
        "rows": selection.plan.rows,
        "named_rows": selection.row_ids is not None,
        "digest": digest(chosen),
        "scores": _place_scores(config_name, digest(scores), scores_by_config),
        "summary": summary(selection),
    }
    target = Path(folder) / record["scores"]["config"] / SCORES
    sweep(target.parent, "scores.*"), sweep(Path(folder) / config_name, "selection.*")
    if record["scores"] not in scores_by_config.values() or not target.is_file():
        # beside the file and not in the record: configs share it, and equal scores may be written anew in other bytes
        noted = target.with_name(SCORES_DIGEST)
        noted.unlink(missing_ok=True)
        write_whole(noted, digest_of(write_whole(target, scores.to_parquet)))
    target = Path(folder) / config_name
    record["chosen_sha256"] = digest_of(write_whole(target / CHOSEN, chosen.to_parquet))
    record = json.loads(json.dumps(record, default=plain))
    record["sha256"] = _seal(record)
    # last, and with the digests of the other two: a write that was cut off is noticed
    write_whole(target / RECORD, json.dumps(record, indent=2, ensure_ascii=False))
    if card:
        _draw(selection, target / PICTURE)
        write_selection_card(folder, records(folder))
    return target


def load(
    where: str | os.PathLike[str],
    config_name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """The arguments of the `Selection` in a folder or a repository."""
    record, (chosen_file, scores_file) = _located(where, config_name, revision, token)
    noted = scores_file.with_name(SCORES_DIGEST)
    sha256 = noted.read_bytes().decode(errors="replace") if noted.is_file() else None  # none in earlier versions
    chosen, scores = _read(chosen_file, record.get("chosen_sha256")), _read(scores_file, sha256)
    with _named_as_damaged(where):
        whole = (digest(chosen), digest(scores)) == (record["digest"], record["scores"]["digest"])
    if not whole:
        raise damaged(where, f"config_name={config_name!r}: {APART}", REMEDY)
    with _named_as_damaged(where):
        return _restored(where, record, chosen, scores)


@contextmanager
def _named_as_damaged(where: Any) -> Iterator[None]:
    """What is missing in files of earlier versions, which have no digest of the whole, becomes a `ValueError`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, UnicodeError) as error:
        raise damaged(where, f"{type(error).__name__}: {error}", REMEDY) from error


def _restored(where: Any, record: Mapping[str, Any], chosen: Dataset, scores: Dataset) -> dict[str, Any]:
    ids = scores["row_id"][:]
    plan = _read_plan(where, record, chosen, ids)
    _check_info(where, record, MARK in scores.column_names)
    table = {name: torch.tensor(_array(scores, name)) for name in scores.column_names if name != "row_id"}
    return {
        "marks": table.pop(MARK, None),
        "drawn_by": table.pop(DRAWN_BY, None),
        "plan": plan,
        "table": table,
        "names": record["names"],
        "info": record["info"] | {"settings": record["settings"]},
        "row_ids": ids if record["named_rows"] else None,
    }


def _check_info(where: Any, record: Mapping[str, Any], marked: bool) -> None:
    """Raise a `ValueError` for values of another kind than those that are written."""
    info, names = record["info"], record["names"]
    columns, source = info.get("marked_columns"), info.get("source", {})
    wrong = [
        name
        for name in ("id_column", "label_column", "labels_hash", "mode", "preset", "gauge")
        if not isinstance(info.get(name), str | None)
    ]
    wrong += ["marked_columns"] if marked and not _are_texts(columns) else []
    wrong += ["names"] if names is not None and not _are_texts(names) else []
    wrong += ["named_rows"] if bool(record["named_rows"]) != (info.get("id_column") is not None) else []
    if not isinstance(source, dict) or not all(isinstance(v, str | int | None) for v in source.values()):
        wrong.append("source")
    if wrong:
        raise damaged(where, f"its record has other values than it can have for {wrong}", REMEDY)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _read_plan(where: Any, record: Mapping[str, Any], chosen: Dataset, ids: list[Any]) -> Plan:
    """The plan in a selection's files, if it can be one: they may be a stranger's.

    Raises:
        ValueError: for rows that are not in the pool or occur twice, and weights or probabilities that are none.
    """
    place = {value: i for i, value in enumerate(ids)}
    rows, names = record["rows"], chosen["row_id"][:]
    weights, likely = (torch.tensor(_array(chosen, name)) for name in ("weight", "inclusion_probability"))
    not_one = ~((likely > 0) & (likely <= 1) | likely.isnan())  # NaN: no closed form
    wrong = {
        f"{len(ids)} scores are for {rows!r} rows": rows != len(ids) or isinstance(rows, bool),
        "the rows of the pool share ids": len(place) < len(ids),
        "no row is selected": not names,
        "rows are selected twice": len(set(names)) < len(names),
        "selected rows are none of the pool's": not set(names) <= set(place),
        "weights are NaN, infinite or negative": not (weights.isfinite() & (weights >= 0)).all(),
        "weights are all zero": not (weights > 0).any(),
        "inclusion probabilities are outside (0, 1]": bool(not_one.any()),
        "settings and info are no dicts": not all(isinstance(record[key], dict) for key in ("settings", "info")),
    }
    for why, is_so in wrong.items():
        if is_so:
            raise ValueError(f"{where}: the selection is damaged ({why}); save or push it again")
    return Plan(torch.tensor([place[value] for value in names]), likely, weights, rows, record["settings"])


def _located(
    where: str | os.PathLike[str], config_name: str, revision: str | None, token: str | bool | None
) -> tuple[dict[str, Any], list[Path]]:
    """The record of a config, and the files of its chosen rows and of its scores, downloaded where need be."""
    check_folder(where, revision)
    folder, get = Path(where), None
    if folder.is_dir():
        configs = sorted(file.parent.name for file in folder.glob(f"*/{RECORD}"))
        _check_config(where, config_name, configs)
    else:
        folder, get = _downloaded(str(where), config_name, revision, token)
    record = records(folder, config_name)[config_name]
    shared = Path(record["scores"]["config"])
    if get is not None:
        more = {"revision": folder.name}  # of the same commit
        for name in (f"{config_name}/{CHOSEN}", f"{shared}/{SCORES}"):
            with suppress(RemoteEntryNotFoundError):  # whoever opens it says so
                get(name, **more)
        noted = f"{shared}/{SCORES_DIGEST}"  # which earlier versions did not write
        if try_to_load_from_cache(str(where), noted, repo_type="dataset", **more) is None:  # else it is known
            with suppress(EntryNotFoundError):
                get(noted, **more)
    return record, [folder / config_name / CHOSEN, folder / shared / SCORES]


def _check_config(where: Any, config_name: str, configs: list[str]) -> None:
    if not configs:
        raise FileNotFoundError(
            f"{where} holds no selection: there is no <config_name>/{RECORD}; write one with "
            "Selection.save or Selection.push_to_hub"
        )
    if config_name not in configs:
        raise ValueError(f"{where} has no config_name={config_name!r}; it has {configs}")


def _downloaded(
    repo_id: str, config_name: str, revision: str | None, token: str | bool | None
) -> tuple[Path, Callable[..., str]]:
    """A folder with the record of a config, and what gets other files into it.

    Files are got by their names: for a list of all of them the client waits without end.
    """
    get = partial(hf_hub_download, repo_id, repo_type="dataset", token=token)
    try:
        return Path(get(f"{config_name}/{RECORD}", revision=revision)).parents[1], get
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a folder nor a repository id; pass owner/name") from error
    except RemoteEntryNotFoundError:
        api = HfApi(token=token)
        files = api.dataset_info(repo_id, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT).siblings
        names = (file.rfilename.split("/") for file in files)
        _check_config(repo_id, config_name, sorted(parts[0] for parts in names if parts[1:] == [RECORD]))
        raise


def push(
    selection: SelectedRows,
    repo_id: str,
    config_name: str,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    **card: Any,
) -> str | None:
    """Save into a copy of the repository's small files, and commit what is new at once."""
    if not is_first():
        return None
    api = HfApi(token=token)
    head, files = own_dataset_repo(api, repo_id, private, lambda name: name.endswith(f"/{RECORD}"), "selection")
    repo_id = head.id
    with tempfile.TemporaryDirectory() as folder:
        api.snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=head.sha,
            local_dir=folder,
            allow_patterns=["README.md", f"*/{RECORD}", f"*/{PICTURE}"],
        )
        before = _scores_of(folder)
        save(selection, folder, config_name)
        _draw(selection, Path(folder) / config_name / PICTURE)
        write_selection_card(folder, records(folder), repo_id=repo_id, **card)
        # no deeper, as the download left a .cache
        new = [path for path in (*Path(folder).glob("[!.]*"), *Path(folder).glob("[!.]*/*")) if path.is_file()]
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in new]
        operations += [CommitOperationDelete(name) for name in (before - _scores_of(folder)) & files]
        return str(
            api.create_commit(
                repo_id,
                operations,
                repo_type="dataset",
                parent_commit=head.sha,
                commit_message=commit_message or f"Selection {config_name}: {len(selection)} rows",
            )
        )


def summary(selection: SelectedRows) -> dict[str, Any]:
    """What the card says of a selection, and labels are needed for, which are not stored."""
    numbers = SelectionReport.of(selection).to_dict()
    suspects = suspect_positions(selection)
    inside = None if suspects is None else int(torch.isin(suspects, selection.plan.positions).sum())
    # the suspects themselves are rows of the source with their labels
    return {name: value for name, value in numbers.items() if name != "suspects"} | {
        "clip": clip_value(selection),
        "suspects_selected": inside,
    }


def records(folder: str | os.PathLike[str], only: str = "*") -> dict[str, dict[str, Any]]:
    """The `selection.json` of every config in a folder, by its name."""
    by_config = {}
    for file in sorted(Path(folder).glob(f"{only}/{RECORD}")):
        try:
            record = read_json(file)
            newer, scores = record["format"] > FORMAT, record["scores"]["config"]
        except (ValueError, KeyError, TypeError) as error:
            why = f"it is no record of a selection ({type(error).__name__}: {error})"
            raise damaged(file, why, REMEDY) from error
        if newer:
            raise ValueError(
                f"{file} has format {record['format']} and this version of hf_effdl reads {FORMAT}; "
                "install a newer one"
            )
        if not re.fullmatch(NAME, scores):  # it becomes a path
            raise ValueError(f"{file} names its scores {scores!r}, which is no folder beside it")
        if not _is_whole(record):
            raise damaged(file, "its content is not what was written", REMEDY)
        by_config[file.parent.name] = record
    return by_config


def _seal(record: Mapping[str, Any]) -> str:
    """The digest of a record but for the digest itself, as it is when it is read again."""
    values = json.loads(json.dumps({name: value for name, value in record.items() if name != "sha256"}))
    return digest_of(json.dumps(values, sort_keys=True))


def _is_whole(record: Mapping[str, Any]) -> bool:
    if "sha256" in record:
        return record["sha256"] == _seal(record)
    return record.keys() == EARLIER  # a name that was changed may be that of the digest


def _scores_of(folder: str) -> set[str]:
    configs = {record["scores"]["config"] for record in records(folder).values()}
    return {f"{config}/{name}" for config in configs for name in (SCORES, SCORES_DIGEST)}


def digest(data: Dataset) -> str:
    """A hash of the columns' values."""
    whole = hashlib.sha256()
    for name in data.column_names:
        values = json.dumps(data[name][:]).encode() if name == "row_id" else _array(data, name).tobytes()
        whole.update(f"{name} {data.features[name].dtype} {len(values)} ".encode() + values)
    return whole.hexdigest()[:16]


def _place_scores(config_name: str, value: str, by_config: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Where scores go: to their equals, else to a name that no other config's scores have."""
    alike = next((scores["config"] for scores in by_config.values() if scores["digest"] == value), None)
    taken = {scores["config"] for name, scores in by_config.items() if name != config_name}
    return {"config": alike or ("scores" if "scores" not in taken else f"scores-{value[:8]}"), "digest": value}


def _draw(selection: SelectedRows, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        picture = plot_overview(selection)
    except ImportError:  # matplotlib is an extra
        return
    write_whole(target, lambda part: picture.savefig(part, dpi=110))


def _read(file: Path, sha256: str | None = None) -> Dataset:
    """A Parquet file, which is not parsed where its digest is known and another one."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; save or push the selection again")
    if sha256 is not None and digest_of(file) != sha256:
        raise damaged(file, APART, REMEDY)
    try:
        # not Dataset.from_parquet, which would copy it into the cache
        with file.open("rb") as stored:
            return Dataset(pq.read_table(stored))
    except Exception as error:  # Arrow's own errors have no common class
        raise damaged(file, str(error), REMEDY) from error


def _array(data: Dataset, name: str) -> np.ndarray:
    # with_format("numpy") would round float64 to float32
    return data.data.column(name).to_numpy()
