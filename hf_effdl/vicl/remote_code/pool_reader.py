"""Reading a pool of labelled examples: a folder, or a data set repository on the Hub. Nothing here writes.

    pool.json                        manifest: task, encoder, shards, fingerprint of the content
    data/pool-00000-<hash>.tar       WebDataset: the images and labels, as files
    data/pool-00000-<hash>.safetensors
        vectors (n, d) float32       unit norm, for the search
        tokens (n, 5, d) float16     for the ranker
        grids (n, gh, gw, d) float16 only where the pool keeps them
        spans (n, 2, 2) int64        first byte and number of bytes of the image and of the label, in the tar
        digests (n, 32) uint8        SHA-256 of each row's id, image and label
        columns uint8                JSON {"group": [...], "class": [...]}, where there are such
        ids uint8                    JSON list

Tensors are memory-mapped and images are read by their place in the tar, so a pool costs hardly any memory.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .images import opened, to_rgb
from .pool_checks import (
    FORMAT,
    IMAGES,
    MANIFEST_BYTES,
    MASKS,
    NAME,
    check_box,
    check_index,
    check_manifest,
    check_values,
    read_columns,
)
from .pool_search import exact_search
from .writing import check_folder


__all__ = ["FORMAT", "MANIFEST", "NAME", "PoolReader", "Shard", "content_fingerprint", "file_digest", "row_digest"]
MANIFEST = "pool.json"
# tables of an index that are not one row an example
SIDE = ("ids", "columns")
# index files up to this many bytes in all are hashed when a pool is opened
HASHED = 2**30
AGAIN = "download the repository again, copy the folder again, or build the pool anew with ExamplePool.from_dataset"


def file_digest(file: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stored:
        return hashlib.file_digest(stored, "sha256").hexdigest()


def row_digest(id: str, image: bytes, label: bytes) -> bytes:
    """SHA-256 of what a row consists of."""
    parts = (id.encode(), image, label)
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


def content_fingerprint(manifest: dict[str, Any], digests: Iterable[Tensor]) -> str:
    """A hash of ids, images, labels, their order, the task and the encoder; the cut into shards does not matter."""
    found = hashlib.sha256(json.dumps([manifest["task"], manifest["encoder"]["fingerprint"]]).encode())
    for part in digests:
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()


class Shard:
    """The two files of a shard, memory-mapped. `kept`: its rows that are still in the pool, None for all of them."""

    def __init__(self, folder: Path, entry: dict[str, Any], width: int | None = None) -> None:
        self.tar, self.index = (folder / "data" / f"{entry['name']}.{kind}" for kind in ("tar", "safetensors"))
        for file, size in ((self.tar, entry["tar_bytes"]), (self.index, entry["index_bytes"])):
            _check_size(file, size, folder)
        tensors, ids = _index(self.index, entry, width)
        self.vectors, self.tokens, self.spans, self.digests = (
            tensors[name] for name in ("vectors", "tokens", "spans", "digests")
        )
        self.grids = tensors.get("grids")
        self.columns = read_columns(tensors.get("columns"), entry["rows"])
        self.kept = None
        if entry["dropped"]:
            keep = torch.ones(entry["rows"], dtype=torch.bool)
            keep[entry["dropped"]] = False
            self.kept = keep.nonzero()[:, 0]
        self.ids: list[str] = ids if self.kept is None else [ids[i] for i in self.kept.tolist()]

    def of_kept(self, table: Tensor) -> Tensor:
        return table if self.kept is None else table[self.kept]


def _check_size(file: Path, size: int, folder: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, which {folder / MANIFEST} names; {AGAIN}")
    if file.stat().st_size != size:
        raise ValueError(
            f"{file} has {file.stat().st_size:,} bytes and {MANIFEST} says {size:,}, as of a "
            f"file that was cut off; {AGAIN}"
        )


def _index(file: Path, entry: dict[str, Any], width: int | None) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of an index, memory-mapped, and the ids in it."""
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        ids = json.loads(tensors["ids"].numpy().tobytes())
        if {len(ids), *(len(table) for name, table in tensors.items() if name not in SIDE)} != {entry["rows"]}:
            raise ValueError(f"it and {MANIFEST} do not agree on its number of rows ({entry['rows']})")
        width = tensors["vectors"].shape[-1] if width is None else width
        check_index(tensors, ids, entry["rows"], width, entry["tar_bytes"])
        read_columns(tensors.get("columns"), entry["rows"])
        return tensors, ids
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error


def _download_shards(repo_id: str, manifest: dict[str, Any], commit: str, token: str | bool | None) -> None:
    """Get the files by their names: for a list of all files of a repository, the client waits without end."""

    def get(name: str) -> None:
        with suppress(RemoteEntryNotFoundError):  # whoever opens it says what is missing
            hf_hub_download(repo_id, name, repo_type="dataset", revision=commit, token=token)

    names = [f"data/{entry['name']}.{kind}" for entry in manifest["shards"] for kind in ("tar", "safetensors")]
    with ThreadPoolExecutor(8) as threads:
        list(tqdm(threads.map(get, names), desc=f"Fetching {len(names)} files", total=len(names)))


class PoolReader:
    """A pool of labelled images with their features: looked up by row or id, searched by similarity.

    It may be handed to the workers of a `DataLoader`: only the folder and the manifest travel, files are opened anew.

    Args:
        folder: holds `pool.json`; `from_pretrained` takes a repository too.
        commit: where the folder came from, for the records.

    Attributes:
        ids: name of every row.
        task: "segmentation", "detection", "colourisation" or "image-to-image".
        encoder: what made the features: id, revision, layer, image_size, fingerprint.
        fingerprint: of ids, images, labels, their order, the task and the encoder.
        commit: of the repository it was loaded from, None for a folder.
        manifest: what `pool.json` holds.

    Raises:
        FileNotFoundError: where there is no pool, or a file of it is missing.
        ValueError: for files that are damaged or do not belong together, and for a pool of a later format.
    """

    def __init__(self, folder: str | os.PathLike[str], commit: str | None = None) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder is a {type(folder).__name__}: pass the path of a pool")
        folder = Path(folder).absolute()
        self._open(folder, _manifest(folder), commit)
        if sum(entry["index_bytes"] for entry in self.manifest["shards"]) <= HASHED:
            self._verify("index")

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
    ) -> "PoolReader":
        """The pool in a folder or in a data set repository (downloaded whole, once).

        Args:
            folder_or_repo: a folder with `pool.json`, or a repository id.
            revision: branch, tag or commit of the repository; default: its main branch.
            token: for a private repository; default: the saved login.
        """
        check_folder(folder_or_repo, revision)
        if Path(folder_or_repo).is_dir():
            return cls(folder_or_repo)
        repo_id = str(folder_or_repo)
        try:
            file = hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=revision, token=token)
        except HFValidationError as error:
            raise FileNotFoundError(f"{repo_id!r} is neither a folder nor a repository id; pass owner/name") from error
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(
                f"the data set repository {repo_id} holds no pool: there is no {MANIFEST}; make "
                "one with ExamplePool.push_to_hub"
            ) from error
        except LocalEntryNotFoundError as error:  # the client does not say what it was asked for
            error.add_note(f"{repo_id!r} is no folder here, and the Hub could not be asked for a pool of that name")
            raise
        folder = Path(file).parent
        commit = folder.name  # a push between the downloads does not matter
        _download_shards(repo_id, _manifest(folder), commit, token)
        return cls(folder, commit=commit)

    def _open(self, folder: Path, manifest: dict[str, Any], commit: str | None) -> None:
        self.folder, self.manifest, self.commit = folder, manifest, commit
        self.task, self.encoder, self.fingerprint = (manifest[key] for key in ("task", "encoder", "fingerprint"))
        self._shards = [Shard(folder, entry, manifest["dim"]) for entry in manifest["shards"]]
        if len({None if shard.grids is None else shard.grids.shape[1:] for shard in self._shards}) > 1:
            raise ValueError(f"{folder / 'data'}: its shards keep feature maps of different shapes; {AGAIN}")
        self._starts = list(accumulate((len(shard.ids) for shard in self._shards), initial=0))
        self._bounds = torch.tensor(self._starts[1:])
        self.ids: list[str] = [id for shard in self._shards for id in shard.ids]
        self._positions = {id: row for row, id in enumerate(self.ids)}
        self._vectors: Tensor | None = None
        if len(self._positions) != len(self.ids):
            raise ValueError(f"{folder / MANIFEST}: {len(self.ids) - len(self._positions)} ids occur twice; {AGAIN}")
        if content_fingerprint(manifest, (shard.of_kept(shard.digests) for shard in self._shards)) != self.fingerprint:
            raise ValueError(f"{folder / MANIFEST} and the files in {folder / 'data'} do not belong together; {AGAIN}")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "commit": self.commit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(**state)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        encoder = self.encoder.get("id") or self.encoder["fingerprint"]
        return (
            f"{type(self).__name__}({len(self):,} rows, task={self.task!r}, encoder={encoder!r}, {str(self.folder)!r})"
        )

    def verify(self) -> None:
        """Read every file whole and compare it with its hash.

        Opening a pool compares sizes, rows and ids, and the hashes of index files up to 1 GiB in all; reading an image
        or a label compares that row's hash.

        Raises:
            ValueError: naming the first damaged file.
        """
        self._verify("index")
        self._verify("tar")

    def _verify(self, kind: str) -> None:
        for shard, entry in zip(self._shards, self.manifest["shards"], strict=True):
            file = getattr(shard, kind)
            if file_digest(file) != entry[f"{kind}_sha256"]:
                raise ValueError(f"{file} is damaged: its SHA-256 is not that in {MANIFEST}; {AGAIN}")
            if kind == "index":
                try:
                    check_values({name: getattr(shard, name) for name in ("vectors", "tokens", "grids")})
                except ValueError as error:
                    raise ValueError(f"{file} is damaged: its {error}; {AGAIN}") from error

    # ---- features

    @property
    def dim(self) -> int:
        """Width d of the features."""
        return self._shards[0].vectors.shape[1]

    @property
    def vectors(self) -> Tensor:
        """`(n, d)` float32 of unit norm. Of several shards it is a copy in memory, which `search` does without."""
        if self._vectors is None:
            parts = [shard.of_kept(shard.vectors) for shard in self._shards]
            self._vectors = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._vectors

    @property
    def groups(self) -> list[str | None] | None:
        """What each row belongs to (a video, a patient, a photo), None for nothing; None where the pool keeps none."""
        return self._column("group")

    @property
    def classes(self) -> list[str | None] | None:
        """The class of each row's object; None where the pool keeps none."""
        return self._column("class")

    def _column(self, name: str) -> list[str | None] | None:
        if not any(name in shard.columns for shard in self._shards):
            return None
        values: list[str | None] = []
        for shard in self._shards:
            column = shard.columns.get(name, [None] * len(shard.digests))
            values += column if shard.kept is None else [column[i] for i in shard.kept.tolist()]
        return values

    def tokens(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Five tokens of each row for the ranker: `(len, 5, d)` float32; `rows (B, k)` give `(B, k, 5, d)`."""
        return self._gather("tokens", rows)

    @property
    def has_grids(self) -> bool:
        """Whether the pool keeps feature maps."""
        return self._shards[0].grids is not None

    def grids(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Feature maps of the rows: `(len, gh, gw, d)` float32; `rows (B, k)` give `(B, k, gh, gw, d)`.

        Raises:
            ValueError: where they were not kept.
        """
        if not self.has_grids:
            raise ValueError(
                "this pool keeps no feature maps; build it with ExamplePool.from_dataset(..., keep_grids=True)"
            )
        return self._gather("grids", rows)

    def _gather(self, name: str, rows: Tensor | Sequence[int]) -> Tensor:
        rows = torch.as_tensor(rows, dtype=torch.long).cpu()
        flat = rows.flatten()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(
                f"rows {int(flat.min())}..{int(flat.max())} of a pool of {len(self)}: pass 0 to {len(self) - 1}"
            )
        shard_of = torch.bucketize(flat, self._bounds, right=True)
        features = torch.empty(len(flat), *getattr(self._shards[0], name).shape[1:])
        for number in shard_of.unique().tolist():
            shard, places = self._shards[number], (shard_of == number).nonzero()[:, 0]
            local = flat[places] - self._starts[number]
            features[places] = getattr(shard, name)[local if shard.kept is None else shard.kept[local]].float()
        return features.view(*rows.shape, *features.shape[1:])

    def search(self, queries: Tensor, k: int = 50, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest rows of each query by inner product with `vectors`, exactly.

        Args:
            queries: `(B, d)`, unit norm for cosine similarity.
            k: rows wanted; fewer come where the pool has fewer.
            exclude: `(B,)` a row that each query must not find, such as its own; -1 for none.

        Returns:
            similarities `(B, k')` float32 and rows `(B, k')` int64, best first, the lower row first where two are
            equal; `k' = min(k, n)`, with `exclude` `min(k, n - 1)`.

        Raises:
            ValueError: for queries of another width, or that are NaN or infinite.
        """
        vectors, k, exclude = self._checked(queries, k, exclude)
        blocks = [(shard.vectors, shard.kept) for shard in self._shards]
        similarities, rows = exact_search(blocks, vectors, k, exclude)
        return similarities.to(queries.device), rows.to(queries.device)

    def _checked(self, queries: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
        if queries.dim() != 2 or queries.shape[1] != self.dim:
            raise ValueError(f'queries of shape {tuple(queries.shape)}; pass (B, {self.dim}), the encoder\'s "vector"')
        if k < 1:
            raise ValueError(f"k={k}: ask for 1 row or more")
        queries = queries.detach().float().cpu()
        if not queries.isfinite().all():
            raise ValueError("queries hold NaN or infinite values; encode them in float32 or bfloat16")
        if exclude is None:
            return queries, min(k, len(self)), None
        exclude = torch.as_tensor(exclude, dtype=torch.long).cpu()
        if exclude.shape != queries.shape[:1]:
            raise ValueError(
                f"exclude has shape {tuple(exclude.shape)}; pass one row for each of {len(queries)} queries"
            )
        return queries, min(k, len(self) - 1), exclude

    # ---- examples

    def position(self, id: str | int) -> int:
        """The row that an id names.

        Raises:
            KeyError: for an id that is not in the pool.
        """
        try:
            return self._positions[str(id)]
        except KeyError:
            raise KeyError(f"id {id!r} is not in this pool of {len(self)} rows") from None

    def image(self, row: int) -> Image.Image:
        """The image of a row as PIL RGB.

        Raises:
            ValueError: where the file was damaged after the pool was opened.
        """
        return to_rgb(opened(self.files(row)[0], IMAGES))

    def label(self, row: int) -> Image.Image | list[float] | None:
        """The label of a row: a white-on-black mask (PIL L), a box `[x0, y0, x1, y1]`, a picture (PIL RGB) or None.

        None is the label of an image without an object in detection, and of every image in colourisation, where the
        image is its own label.
        """
        stored = self.files(row)[1]
        if self.task == "segmentation":
            mask = opened(stored, MASKS).convert("L")
            mask.white_on_black = True  # not the class numbers of the data set that the pool was made from
            return mask
        if self.task == "image-to-image":
            return to_rgb(opened(stored, MASKS))
        try:
            return check_box(json.loads(stored).get("box"))
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"the label of row {row}, id {self.ids[row]!r}, is damaged ({error}); {AGAIN}") from error

    def files(self, row: int) -> tuple[bytes, bytes]:
        """The files of a row as they are stored: its image, and its label (a mask as PNG, or JSON).

        Raises:
            IndexError: for a row that is not in the pool.
            ValueError: where the file was damaged after the pool was opened.
        """
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a pool of {len(self)}: pass 0 to {len(self) - 1}")
        number = int(torch.bucketize(torch.tensor(row), self._bounds, right=True))
        shard, local = self._shards[number], row - self._starts[number]
        local = local if shard.kept is None else int(shard.kept[local])
        # opened for each reading, which costs little: no handle is shared between threads or processes
        with open(shard.tar, "rb") as file:
            parts = []
            for start, size in shard.spans[local].tolist():
                file.seek(start)
                parts.append(file.read(size))
        if row_digest(self.ids[row], *parts) != shard.digests[local].numpy().tobytes():
            raise ValueError(
                f"{shard.tar} is damaged: row {row}, id {self.ids[row]!r}, is not what was written; {AGAIN}"
            )
        return parts[0], parts[1]


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no pool: there is no {MANIFEST}; make one with "
            "ExamplePool.from_dataset and save_pretrained"
        )
    try:
        if (size := file.stat().st_size) > MANIFEST_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        manifest = json.loads(file.read_text(encoding="utf-8"))
        check_manifest(manifest)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read as a pool's manifest ({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    return manifest
