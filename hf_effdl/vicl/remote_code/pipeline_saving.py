"""A pipeline as files: its model and pool, the code that runs it anywhere, and its card; in a folder or on the Hub."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.dynamic_module_utils import get_relative_import_files

from .pipeline_card import write_model_card
from .pipeline_loading import fingerprint_in, is_repository, save_pool
from .strategies import AUTO
from .writing import copy_file, is_first, locked, remove_weights


@contextmanager
def saved(pipe: Any, folder: Path, strategy: Any, candidates: int, code: str, repo_id: str | None) -> Iterator[bool]:
    """Save what is around a pipeline's model: before it the pool, and behind it code and card.

    Args:
        pipe: the pipeline, whose config is told what is saved; "auto" it stays, and what was found is in the file.
        folder: where to.
        strategy, candidates: of the pipeline.
        code: the pipeline's own file, which names the others that it needs.
        repo_id: where it will be pushed, for the card.

    Yields:
        Whether this process has to save the model.
    """
    config, first = pipe.model.config, is_first()
    before = config.strategy
    if isinstance(strategy, str):
        config.strategy = strategy
    elif hasattr(strategy, "settings"):
        pipe.model.set_selector(strategy)
    else:
        warnings.warn(
            f"the strategy of this pipeline is a {type(strategy).__name__} and cannot be saved: the "
            f"saved one will use {config.strategy!r}",
            stacklevel=4,
        )
    config.candidates = candidates
    with locked(folder, ".lock-pipeline") if first else nullcontext():
        yield from _around_model(pipe, folder, before, code, repo_id)


def _around_model(pipe: Any, folder: Path, before: Any, code: str, repo_id: str | None) -> Iterator[bool]:
    """The steps of `saved`, in a folder of one's own."""
    config, first = pipe.model.config, is_first()
    if config.frozen_model is not None and (config.pool is None or not is_repository(config.pool)):
        if first and fingerprint_in(folder / "pool") not in (None, pipe.pool.fingerprint):
            remove_weights(folder)  # the model of before is not to be read with this pool
        if first or hasattr(pipe.pool, "save_pretrained"):  # which waits for the first
            save_pool(pipe.pool, folder / "pool")
        config.pool, config.pool_revision = "pool", None
    try:
        yield first
        if first:
            # of a pipeline whose code came from the Hub upstream copies the model's files alone
            for file in map(Path, (code, *get_relative_import_files(code))):
                if file.resolve() != (folder / file.name).resolve():
                    copy_file(file, folder / file.name)
            write_model_card(folder, config, pipe.pool, repo_id)
    finally:
        if before == AUTO and pipe.selector is None:  # here, where the pool may still change
            config.strategy = before


def pushed(
    pipe: Any,
    repo_id: str,
    pool_repo_id: str | None,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
) -> str | None:
    """Push a pipeline, and first its pool; see `VisualInContextPipeline.push_to_hub`."""
    if not is_first():
        return None
    config, api = pipe.model.config, HfApi(token=token)
    if pool_repo_id is not None or config.pool is None or not is_repository(config.pool):
        if not hasattr(pipe.pool, "push_to_hub"):
            raise ValueError(
                "the pool was read and not built here: load it with ExamplePool.from_pretrained to "
                "push it, or set model.config.pool to its repository"
            )
        pool_repo_id = pool_repo_id or f"{repo_id}-pool"
        pipe.pool.push_to_hub(pool_repo_id, private=private, token=token)
        config.pool, config.pool_revision = pool_repo_id, api.dataset_info(pool_repo_id).sha
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        # by hand, since the base class puts an empty template in the place of the card
        if api.file_exists(repo_id, "README.md"):
            api.hf_hub_download(repo_id, "README.md", local_dir=folder)
        pipe.save_pretrained(folder, repo_id=repo_id)
        message = commit_message or f"{config.task} in context, examples of {config.pool}"
        return str(
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=[".cache/*"]
            )
        )
