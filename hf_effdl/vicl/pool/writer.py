"""Writing a pool: rows of a data set become shards, each whole or absent; the manifest comes last."""

import io
import json
import os
import shutil
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from hf_effdl.files import digest, flush, write_whole
from hf_effdl.version import __version__
from hf_effdl.vicl.pool.rows import Row, Rows
from hf_effdl.vicl.remote_code.masks import added, check_one_meaning, tally, told
from hf_effdl.vicl.remote_code.pool_checks import check_entry
from hf_effdl.vicl.remote_code.pool_reader import MANIFEST, Shard, content_fingerprint, row_digest


SHOWN = 5
# seconds after which a file that was not finished is removed
LITTER = 86_400


# ---- shards


def processes() -> PartialState:
    """This process and its siblings; unlike an `Accelerator` it leaves the precision of a later one open.

    Siblings that have not been told yet that they are on a CPU do not see each other here: one of them builds a pool
    and the others, which wait for its lock, open it.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class ShardWriter:
    """Writes a tar and its index, each whole or not at all; the tar grows under another name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.tar, self.index = name, folder / f"{name}.tar", folder / f"{name}.safetensors"
        self.spans: list[list[tuple[int, int]]] = []
        self.digests: list[bytes] = []
        self.ids: list[str] = []
        self.columns: dict[str, list[str | None]] = {}
        self.formats: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        self._part = self.tar.with_name(f".{self.tar.name}.{os.getpid()}")
        self._file = self._part.open("wb")
        self._stored = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    def add(self, key: str, id: str, files: Mapping[str, bytes], columns: Mapping[str, str | None]) -> None:
        """Append a row's files: `image.*`, and `label.png` or `json`, which holds its label; and what else is said."""
        spans = {}
        for name, content in files.items():
            info = tarfile.TarInfo(f"{key}.{name}")  # time 0, owner 0: equal rows give equal files
            info.size = len(content)
            # the header of a short name is one block
            spans[name] = (self._file.tell() + tarfile.BLOCKSIZE, len(content))
            self._stored.addfile(info, io.BytesIO(content))
        image, label = next(iter(files)), "label.png" if "label.png" in files else "json"
        self.spans.append([spans[image], spans[label]])
        self.digests.append(row_digest(id, files[image], files[label]))
        self.ids.append(id)
        for name, value in columns.items():
            self.columns.setdefault(name, []).append(value)
        self.formats.add(image.partition(".")[2])

    def finish(self, tables: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write the index with these features; returns what the manifest says of the shard."""
        self._stored.close()
        self._file.close()
        tensors = {name: table.contiguous() for name, table in tables.items()} | {
            "spans": torch.tensor(self.spans),
            "ids": _bytes(json.dumps(self.ids).encode()),
            "digests": _bytes(b"".join(self.digests)).view(-1, 32),
        }
        if self.columns:
            tensors["columns"] = _bytes(json.dumps(self.columns).encode())
        write_whole(self.index, lambda part: save_file(tensors, str(part)))
        flush(self._part)
        entry = {
            "name": self.name,
            "rows": len(self.ids),
            "dropped": [],
            "formats": sorted(self.formats),
            "tar_bytes": self._part.stat().st_size,
            "tar_sha256": digest(self._part),
            "index_bytes": self.index.stat().st_size,
            "index_sha256": digest(self.index),
        }
        os.replace(self._part, self.tar)
        flush(self.tar.parent)
        return entry


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Count and hash what the shards hold, and write the manifest."""
    shards = [Shard(folder, entry) for entry in manifest["shards"]]
    manifest = dict(manifest) | {
        "rows": sum(len(shard.ids) for shard in shards),
        "dim": shards[0].vectors.shape[1],
        "grid": None if shards[0].grids is None else list(shards[0].grids.shape[1:3]),
        "fingerprint": content_fingerprint(manifest, (shard.of_kept(shard.digests) for shard in shards)),
        "hf_effdl": __version__,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


@dataclass(frozen=True)
class Encoding:
    """How the rows of a data set are encoded.

    Args:
        encoder: makes the features.
        batch_size: images encoded at once.
        num_workers: processes that read and decode images, for each process that encodes.
        on_bad_row: "raise", or "skip" rows that cannot be used.
        progress: show a bar on the first process.
    """

    encoder: Any
    batch_size: int = 32
    num_workers: int = 0
    on_bad_row: str = "raise"
    progress: bool = True

    def check(self, rows_per_shard: int) -> None:
        """Refuse what cannot be."""
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row={self.on_bad_row!r}: it must be 'raise' or 'skip'")
        if rows_per_shard < 1 or self.batch_size < 1:
            raise ValueError(f"rows_per_shard={rows_per_shard} and batch_size={self.batch_size} must be 1 or more")


def build(folder: Path, manifest: Mapping[str, Any], source: Rows, encoding: Encoding) -> None:
    """Write the shards of the source that are not there yet, then the manifest with them appended.

    All processes call it. Which shards are finished is written down in `done/`, one file each.
    """
    state, size = processes(), manifest["settings"]["rows_per_shard"]
    encoding.check(size)
    if state.is_main_process:
        _make_room(folder)
    names = _shard_names(manifest, source.key(manifest, encoding.on_bad_row), -(-len(source) // size))
    # the first process tells the others, as what is done changes while they look
    todo = broadcast_object_list([[i for i, name in enumerate(names) if _done(folder, name) is None]])[0]
    mine = {
        names[i]: range(i * size, min((i + 1) * size, len(source)))
        for i in todo[state.process_index :: state.num_processes]
    }
    error = None
    try:
        _write_shards(folder, mine, source, encoding, manifest["settings"]["keep_grids"])
    except Exception as caught:  # the others are to hear of it, else they would wait for ever
        error = caught
    said = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    if any(said):
        raise RuntimeError(f"another process could not encode its rows: {next(filter(None, said))}")
    if state.is_main_process:
        _finish(folder, manifest, names, len(source))
    state.wait_for_everyone()


def _make_room(folder: Path) -> None:
    """The folders of a pool, without what killed runs left; a younger file may be being written."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "done").mkdir(exist_ok=True)
    for part in (folder / "data").glob(".pool-*"):
        if time.time() - part.stat().st_mtime > LITTER:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def _shard_names(manifest: Mapping[str, Any], key: str, count: int) -> list[str]:
    """Of the shards to come, numbered on; the same on all processes."""
    if len({*gather_object([key])}) > 1:
        raise ValueError(
            "the processes hold different data sets (a shuffle without a seed?) or settings: pass the same"
        )
    number = 1 + max((int(entry["name"].split("-")[1]) for entry in manifest["shards"]), default=-1)
    return [f"pool-{number + i:05d}-{key}" for i in range(count)]


def _write_shards(
    folder: Path, rows_of: Mapping[str, range], source: Rows, encoding: Encoding, keep_grids: bool
) -> None:
    """Write this process's shards, by name, and that they are done."""
    state = processes()
    encoding.encoder.to(state.device).eval()
    hidden = not (encoding.progress and rows_of and state.is_main_process)
    with tqdm(total=sum(map(len, rows_of.values())), desc="encoding", unit=" rows", disable=hidden) as bar:
        for name, rows in rows_of.items():
            with ShardWriter(folder / "data", name) as writer:
                how = {"num_workers": encoding.num_workers, "collate_fn": list}
                batches = DataLoader(Subset(source, rows), encoding.batch_size, generator=torch.Generator(), **how)
                entry = _encode(writer, batches, encoding, state.device, keep_grids, bar)
            note = {"entry": entry, "sha256": digest(json.dumps(entry))}
            write_whole(folder / "done" / f"{name}.json", json.dumps(note))


def _encode(
    writer: ShardWriter, batches: DataLoader, encoding: Encoding, device: torch.device, keep_grids: bool, bar: tqdm
) -> dict[str, Any]:
    """One shard; returns what the manifest says of it."""
    skipped: list[list[str]] = []
    blank: list[int] = []
    masks = tally(())
    tables: dict[str, list[Tensor]] = {"vectors": [], "tokens": [], "grids": []}
    for batch in batches:
        bar.update(len(batch))
        bad = [row for row in batch if row.error is not None]
        if bad and encoding.on_bad_row == "raise":
            raise ValueError(
                f"row {bad[0].number}, id {bad[0].id!r}: {bad[0].error} (correct the row, leave it out, or "
                "pass on_bad_row='skip')"
            )
        skipped += [[row.id, row.error] for row in bad]
        good = [row for row in batch if row.error is None]
        if not good:
            continue
        for name, values in _views(encoding.encoder, good, device, keep_grids).items():
            tables[name].append(values)
        for row in good:
            if row.blank:
                blank.append(len(writer.ids))
            writer.add(row.key, row.id, row.files, row.columns)
        masks = added(masks, tally(row.mask for row in good if row.mask is not None))
        check_one_meaning(masks)
    entry = {"name": writer.name, "rows": 0}
    if writer.ids:
        entry = writer.finish({name: torch.cat(parts) for name, parts in tables.items() if parts})
    return entry | {"blank": blank, "skipped": skipped} | ({"masks": masks} if masks["masks"] else {})


@torch.no_grad()
def _views(encoder: Any, batch: Sequence[Row], device: torch.device, keep_grids: bool) -> dict[str, Tensor]:
    """Features of some rows, as they are stored."""
    views = encoder(torch.stack([row.pixels for row in batch]).to(device))
    stored = {"vectors": views["vector"].float().cpu(), "tokens": views["tokens"].half().cpu()}
    if keep_grids:
        stored["grids"] = views["grid"].half().cpu()
    _check_views(stored, batch)
    return stored


def _check_views(views: Mapping[str, Tensor], batch: Sequence[Row]) -> None:
    for name, values in views.items():
        if not (finite := values.flatten(1).isfinite().all(1)).all():
            row = batch[int((~finite).nonzero()[0, 0])]
            raise ValueError(
                f"row {row.number}, id {row.id!r}: the encoder's {name} are NaN or beyond float16's "
                "65504; encode in float32"
            )
    if ((norms := views["vectors"].norm(dim=1)) - 1).abs().max() > 1e-3:
        raise ValueError(
            f"the encoder's vectors have norms {norms.min():.4g}..{norms.max():.4g}; they must have norm 1"
        )


def _done(folder: Path, name: str) -> dict[str, Any] | None:
    """What was written down of a finished shard whose files are there, and whose index is what was written."""
    try:
        note = json.loads((folder / "done" / f"{name}.json").read_text(encoding="utf-8"))
        entry = note["entry"]
        if note["sha256"] != digest(json.dumps(entry)):
            return None
        if entry["rows"]:
            check_entry(entry)
        for kind, size in (("tar", "tar_bytes"), ("safetensors", "index_bytes")):
            file = folder / "data" / f"{name}.{kind}"
            if entry["rows"] and not (file.is_file() and file.stat().st_size == entry[size]):
                return None
        if entry["rows"] and (entry["name"] != name or digest(file) != entry["index_sha256"]):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # damaged: written again
        return None
    return entry


def _finish(folder: Path, manifest: Mapping[str, Any], names: Sequence[str], rows: int) -> None:
    entries = [_done(folder, name) for name in names]
    if None in entries:
        raise FileNotFoundError(
            f"{folder / 'data' / names[entries.index(None)]}.tar is missing; all processes must see the same cache_dir"
        )
    skipped = [row for entry in entries for row in entry["skipped"]]
    if len(skipped) == rows:
        raise ValueError(
            f"none of the {rows} rows can be used: mend them; the first, {skipped[0][0]!r}: {skipped[0][1]}"
        )
    shards = manifest["shards"] + [entry for entry in entries if entry["rows"]]
    masks = masks_of(shards)
    check_one_meaning(masks)
    write_manifest(folder, manifest | {"shards": shards, "seen": manifest["seen"] + rows})
    if masks["masks"]:
        print(f"masks: {told(masks)}", file=sys.stderr, flush=True)
    _warn(rows, skipped, blank=sum(len(entry["blank"]) for entry in entries), masks=masks_of(entries))


def masks_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the masks of some shards were taken for."""
    return reduce(added, [entry["masks"] for entry in entries if entry.get("masks")], tally(()))


def _warn(rows: int, skipped: Sequence[Sequence[str]], blank: int, masks: Mapping[str, Any]) -> None:
    if skipped:
        shown = "; ".join(f"{id!r}: {reason}" for id, reason in skipped[:SHOWN])
        warnings.warn(f"{len(skipped)} of {rows} rows were skipped: {shown}", stacklevel=5)
    if blank:
        warnings.warn(
            f"{blank} of {rows} labels mark nothing; they are kept, as examples without an object", stacklevel=5
        )
    if grey := masks["grey"]:
        warnings.warn(
            f"{grey} of {rows} labels have as many values as pictures have, and class maps hardly ever: does "
            "label_column= name masks?",
            stacklevel=5,
        )
    if full := masks["full"]:
        warnings.warn(
            f"{full} of {rows} labels mark every pixel; they are kept, but look whether foreground= names the "
            "background too",
            stacklevel=5,
        )


# ---- copies


def compacted(manifest: Mapping[str, Any], shards: Sequence[Shard], folder: Path) -> Iterator[dict[str, Any]]:
    """Put the shards into another folder, without the rows that were removed; gives what the manifest says of each."""
    for entry, shard in zip(manifest["shards"], shards, strict=True):
        if shard.kept is None:
            _copied(shard, folder)
            yield entry
        elif shard.ids:
            yield _without_removed(entry, shard, folder)


def _copied(shard: Shard, folder: Path) -> None:
    for file in (shard.tar, shard.index):
        target = folder / "data" / file.name
        if target.resolve() != file.resolve():
            write_whole(target, lambda part, file=file: shutil.copyfile(file, part))


def _without_removed(entry: Mapping[str, Any], shard: Shard, folder: Path) -> dict[str, Any]:
    """Write a shard anew, under a name that says what was dropped."""
    key = digest(json.dumps([entry["name"], entry["dropped"]]))[:12]
    kept, blank = shard.kept.tolist(), set(entry["blank"])
    with ShardWriter(folder / "data", entry["name"][:-12] + key) as writer:
        for place, (name, files), id in zip(kept, _members(shard.tar, set(kept)), shard.ids, strict=True):
            writer.add(name, id, files, {column: values[place] for column, values in shard.columns.items()})
        tables = {name: getattr(shard, name) for name in ("vectors", "tokens", "grids")}
        written = writer.finish({name: table[kept] for name, table in tables.items() if table is not None})
    blank = [i for i, row in enumerate(kept) if row in blank]
    said = {"masks": entry["masks"]} if "masks" in entry else {}
    return written | {"blank": blank, "skipped": entry["skipped"]} | said


def _members(tar: Path, rows: set[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of some rows of a tar."""
    with tarfile.open(tar) as stored:
        for row, (key, members) in enumerate(groupby(stored, lambda member: member.name.partition(".")[0])):
            if row in rows:
                yield key, {member.name.partition(".")[2]: stored.extractfile(member).read() for member in members}
