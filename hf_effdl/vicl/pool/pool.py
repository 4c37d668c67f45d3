"""A pool of labelled examples: encoded once from a data set, kept as a folder, grown, shared and searched."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_effdl.files import locked
from hf_effdl.vicl.pool import index as pool_index
from hf_effdl.vicl.pool.card import push_pool, without_paths, write_pool_card
from hf_effdl.vicl.pool.writer import Encoding, Rows, build, compacted, processes, write_manifest
from hf_effdl.vicl.remote_code.pool_reader import FORMAT, MANIFEST, NAME, PoolReader
from hf_effdl.vicl.remote_code.vision_encoder import VisionEncoder
from hf_effdl.vicl.remote_code.visual_tasks import find_task


class ExamplePool(PoolReader):
    """Labelled images with their features, which examples for a query are chosen from; see `PoolReader` for reading.

    A pool lives in a folder. `add` and `remove` change it in place, by a new manifest and new shards; what is in a
    shard stays. Above 100,000 rows `search` uses a FAISS index, where `faiss` is installed, and is approximate.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import datasets
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> from hf_effdl.vicl.remote_code.vision_encoder import VisionEncoder
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> encoder = VisionEncoder(ViTModel(config), image_size=32)
        >>> images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
        >>> data = Dataset.from_dict({"image": images, "box": [[0, 0, 9, 9], [5, 5, 30, 20], [1, 2, 3, 4]]})
        >>> data = data.cast_column("image", datasets.Image())
        >>> with TemporaryDirectory() as folder:
        ...     pool = ExamplePool.from_dataset(
        ...         data, label_column="box", encoder=encoder, task="detection", cache_dir=folder, progress=False
        ...     )
        ...     similarity, rows = pool.search(pool.vectors[1:2], k=1)
        ...     len(pool), pool.ids, rows.tolist(), pool.label(1), pool.image(0).size
        (3, ['0', '1', '2'], [[1]], [5, 5, 30, 20], (40, 30))
    """

    cache_dir: Path | None = None
    _encoder: nn.Module | None = None
    _index: Any = None

    @classmethod
    def from_dataset(
        cls,
        ds: Dataset,
        image_column: str = "image",
        label_column: str = "label",
        *,
        encoder: Any,
        task: Any = "segmentation",
        id_column: str | None = None,
        group_column: str | None = None,
        class_column: str | None = None,
        foreground: int | Iterable[int] | str | None = None,
        boxes: str | None = None,
        keep_grids: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        rows_per_shard: int = 1024,
        num_workers: int = 0,
        on_bad_row: str = "raise",
        progress: bool = True,
    ) -> "ExamplePool":
        """Encode a data set, shard by shard; every process of `accelerate launch` or `torchrun` takes its share.

        Features are of what the frozen model sees of an image, `task.query(image)`: its grey version in colourisation.

        Shards are files that come into being whole, named by data, encoder and settings: a run that was killed goes on
        from the finished ones, and the same call made again only opens the pool. All processes must see `cache_dir`.
        The same call makes the same pool again, without what `add` and `remove` did to it since: to keep that, use
        `save_pretrained`. Masks and boxes that mark nothing are kept, as examples without an object, and a warning
        counts them.

        Args:
            ds: images that are JPEG, PNG or WebP files go into the pool as they are, others as PNG.
            image_column: a `datasets.Image` column, or one of paths or file contents.
            label_column: masks for segmentation, also as COCO's polygons or runs; boxes `[x0, y0, x1, y1]` or None
                for detection, see `boxes`; pictures for "image-to-image"; not read for colourisation.
            encoder: a `VisionEncoder`, a vision model of transformers, or the id or folder of one.
            task: "segmentation", "detection", "colourisation", "image-to-image", or an instance such as
                `Segmentation(void=None)`.
            id_column: unique texts or integers that name the rows; default: their numbers, from 0.
            group_column: what rows belong to (a video, a patient, a photo), texts or integers: no image is shown an
                example of its own group, see `VisualInContextPipeline`.
            class_column: what a row's object is, so that one pool can hold many classes.
            foreground: mask values that are the object, or "any"; see `Segmentation`, which says what is understood
                without it. Masks are stored white on black; what they were taken for is told on stderr, and in the
                card.
            boxes: for detection, "xyxy" (default) or "xywh", COCO's `[x, y, width, height]`; they are kept as corners.
            keep_grids: keep feature maps too, for dense similarity: `gh * gw * d * 2` bytes a row.
            cache_dir: where pools are made; default: `hf_effdl/pools` in the Hugging Face cache.
            batch_size: images encoded at once.
            rows_per_shard: rows in a file; what a killed run loses at most, for each process.
            num_workers: processes that read and decode images, for each process that encodes.
            on_bad_row: "raise", or "skip" rows that cannot be used, with a warning that counts them.
            progress: show a bar on the first process.

        Raises:
            ValueError: for an empty data set, columns that are not there, ids that occur twice, and, by row and id,
                an image that cannot be read, a mask of another size or a box that is not inside its image.
            TypeError: for another kind of data set, column or id.
        """
        encoder = _loaded(encoder)
        task = find_task(task, foreground, boxes)
        settings = {
            "image_column": image_column,
            "label_column": None if task.name == "colourisation" else label_column,
            "id_column": id_column,
            "keep_grids": bool(keep_grids),
            "rows_per_shard": int(rows_per_shard),
        }
        said = {"group_column": group_column, "class_column": class_column}
        settings |= {name: column for name, column in said.items() if column is not None}
        if task.name == "segmentation":
            named = task.foreground
            settings |= {"foreground": list(named) if isinstance(named, tuple) else named, "void": task.void}
        elif task.name == "detection" and task.boxes != "xyxy":
            settings["boxes"] = task.boxes
        start = {"format": FORMAT, "task": task.name, "settings": settings, "encoder": encoder.describe()}
        cache_dir = _cache(cache_dir)
        source = Rows(ds, start, encoder, 0)
        folder = cache_dir / f"pool-{source.key(start, on_bad_row)}"
        encoding = Encoding(encoder, batch_size, num_workers, on_bad_row, progress)
        with _alone(folder):
            build(folder, start | {"shards": [], "seen": 0}, source, encoding)
        pool = cls(folder)
        pool.cache_dir, pool._encoder = cache_dir, encoder
        return pool

    @property
    def encoder_module(self) -> nn.Module | None:
        """The encoder that it was built with in this process; None for a pool that was loaded."""
        return self._encoder

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"cache_dir": self.cache_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.cache_dir = state["cache_dir"]
        super().__setstate__({name: value for name, value in state.items() if name != "cache_dir"})

    # ---- changes in place

    def add(
        self,
        ds: Dataset,
        *,
        encoder: Any = None,
        batch_size: int = 32,
        num_workers: int = 0,
        on_bad_row: str = "raise",
        progress: bool = True,
    ) -> "ExamplePool":
        """Append the rows of a data set with the same columns, as new shards; all processes call it.

        Without an id column rows go on being numbered where they ended, and no number is given twice.

        Args:
            encoder: the one the pool was made with; needed where this process did not make the pool.
            batch_size, num_workers, on_bad_row, progress: see `from_dataset`.

        Returns:
            the pool.

        Raises:
            ValueError: for another encoder, ids that the pool has, or a pool in the cache of the Hub.
        """
        self._check_mine()
        if encoder is None and self._encoder is None:
            raise ValueError(
                f"add needs the encoder that the pool was made with; pass encoder={self.encoder.get('id')!r}"
            )
        encoder = self._encoder if encoder is None else _loaded(encoder)
        if encoder.describe()["fingerprint"] != self.encoder["fingerprint"]:
            raise ValueError(
                f"encoder= has the fingerprint {encoder.describe()['fingerprint']!r} and the pool was "
                f"made with {self.encoder}; their vectors cannot be compared: pass that one"
            )
        with _alone(self.folder):
            self._reopen()  # as others have left it
            source = Rows(ds, self.manifest, encoder, self.manifest["seen"])
            if shared := set(source.ids) & self._positions.keys():
                raise ValueError(
                    f"{len(shared)} ids are in the pool already, such as {min(shared)!r}; remove them first"
                )
            build(self.folder, self.manifest, source, Encoding(encoder, batch_size, num_workers, on_bad_row, progress))
        self._reopen()
        self._encoder = encoder
        return self

    def remove(self, ids: Iterable[str | int]) -> "ExamplePool":
        """Take rows out, by id. Their files stay until `save_pretrained` or `push_to_hub`, which leave them out.

        Returns:
            the pool.

        Raises:
            KeyError: for an id that is not in the pool; nothing is removed then.
            ValueError: for all rows of the pool, or a pool in the cache of the Hub.
        """
        self._check_mine()
        ids = [ids] if isinstance(ids, (str, int)) else list(ids)
        with _alone(self.folder):
            self._reopen()  # as others have left it
            rows = sorted({self.position(id) for id in ids})
            if len(rows) == len(self):
                raise ValueError(f"these are all {len(rows)} rows of the pool; a pool needs one or more")
            manifest = json.loads(json.dumps(self.manifest))
            for entry, shard, start in zip(manifest["shards"], self._shards, self._starts, strict=False):
                gone = [row - start for row in rows if start <= row < start + len(shard.ids)]
                gone = gone if shard.kept is None else shard.kept[gone].tolist()
                entry["dropped"] = sorted(entry["dropped"] + gone)
            state = processes()
            if rows and state.is_main_process:
                write_manifest(self.folder, manifest)
            state.wait_for_everyone()
        self._reopen()
        return self

    def _check_mine(self) -> None:
        if self.commit is not None:
            raise ValueError(
                "this pool lies in the cache of the Hub, which is not to be changed; save it with "
                "save_pretrained(folder) and open it there"
            )

    def _reopen(self) -> None:
        self._index = None
        self.__init__(self.folder, self.commit)

    # ---- storage

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the pool into a folder, without removed rows; a pool that is there is replaced once this one is whole.

        On several processes the first one writes. Returns the folder.
        """
        state, folder = processes(), Path(folder).absolute()
        own = folder.resolve() == self.folder.resolve()
        if own:
            self._check_mine()
        if state.is_main_process:
            with locked(folder):
                self.copied_to(folder)
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                write_pool_card(folder, manifest)
                names = {entry["name"] for entry in manifest["shards"]}
                for file in (folder / "data").iterdir():
                    if re.fullmatch(rf"{NAME}\.(tar|safetensors)", file.name) and file.stem not in names:
                        file.unlink()
        state.wait_for_everyone()
        if own:
            self._reopen()
        return folder

    def copied_to(self, folder: Path) -> Path:
        """Write shards without removed rows into a folder, and the manifest last. Returns the folder."""
        (folder / "data").mkdir(parents=True, exist_ok=True)
        manifest = self.manifest if folder.resolve() == self.folder.resolve() else without_paths(self.manifest)
        write_manifest(folder, manifest | {"shards": list(compacted(self.manifest, self._shards, folder))})
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        *,
        license: str | None = None,
        tags: Iterable[str] = (),
    ) -> str | None:
        """Push the pool to a data set repository, with a card, in one commit; an older pool there is replaced.

        `load_dataset(repo_id)` reads the images and labels of it.

        Args:
            repo_id: made if need be.
            private: whether to make it private; default: the namespace's own default.
            token: default: the saved login.
            commit_message: default: says how many rows there are.
            license, tags: for the card, whose other metadata are kept.

        Returns:
            URL of the commit; None on other processes than the first.

        Raises:
            ValueError: where the repository holds other data, or is public and `private=True`.
        """
        if not processes().is_main_process:
            return None
        return push_pool(self, repo_id, private, token, commit_message, license=license, tags=tags)

    # ---- search

    def search(
        self, queries: Tensor, k: int = 50, exclude: Tensor | None = None, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The nearest rows of each query, as `PoolReader.search`; approximate above 100,000 rows with `faiss`.

        The first such search builds the index (see `build_index`) unless it is in `cache_dir`. On several processes
        build it beforehand in one of them.

        Args:
            exact: compare with every row, whatever the size.
        """
        if not exact and self._index is None and len(self) > pool_index.LEAST_ROWS:
            self._open_index()
        if exact or not self._index:
            return super().search(queries, k, exclude)
        vectors, k, exclude = self._checked(queries, k, exclude)
        similarities, rows = self._index.search(vectors, k, exclude)
        if len(short := (rows < 0).any(1).nonzero()[:, 0]):  # the lists that were looked into held too few rows
            excluded = None if exclude is None else exclude[short]
            similarities[short], rows[short] = super().search(vectors[short], k, excluded)
        return similarities.to(queries.device), rows.to(queries.device)

    def build_index(self, recall: float = 0.95, progress: bool = True) -> dict[str, Any]:
        """Build the FAISS index (`IVF,Flat`, inner product) for this pool's content, keep it in `cache_dir`, use it.

        Args:
            recall: share of the 50 exact neighbours that is to be found, on 200 rows of the pool; as many lists are
                looked into as that takes.
            progress: show a bar.

        Returns:
            `rows`, `lists`, `probes`, the `recall` reached, and `seconds`.

        Raises:
            ImportError: without `faiss`.
        """
        blocks = [(shard.vectors, shard.kept) for shard in self._shards]
        self._index = pool_index.build_index(
            blocks, self._index_file(), self.fingerprint, recall=recall, progress=progress
        )
        return self._index.record

    def _open_index(self) -> None:
        if not pool_index.installed():
            self._index = False  # so that it is said once
            warnings.warn(
                f"the pool has {len(self):,} rows, and every search compares with each of them; "
                'pip install "faiss-cpu>=1.9" for an index',
                stacklevel=3,
            )
            return
        self._index = pool_index.open_index(self._index_file(), self.fingerprint, len(self), self.dim)
        if self._index is None:
            self.build_index()

    def _index_file(self) -> Path:
        return _cache(self.cache_dir) / f"index-{self.fingerprint[:16]}.faiss"


def _cache(folder: str | os.PathLike[str] | None) -> Path:
    return Path(HF_HOME) / "hf_effdl" / "pools" if folder is None else Path(folder).absolute()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Have a pool to ourselves, all processes of this run together."""
    state = processes()
    with locked(folder) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


def _loaded(encoder: Any) -> Any:
    if isinstance(encoder, (str, os.PathLike)):
        return VisionEncoder.from_pretrained(os.fspath(encoder))
    if isinstance(encoder, PreTrainedModel):
        return VisionEncoder(encoder)
    if not hasattr(encoder, "describe"):
        raise TypeError(
            f"encoder={type(encoder).__name__}: pass a VisionEncoder, a vision model of transformers, or "
            "the id or folder of one"
        )
    return encoder
