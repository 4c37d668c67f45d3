"""`score_shards_on_ray`: the same scores by a pool of actors of Ray Data, on the machines of a cluster."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_effdl.checks import whole_number
from hf_effdl.samples.scale.score_shards import ShardWork, shard_work
from hf_effdl.samples.scale.scorers import RowScorer, as_scorer


def score_shards_on_ray(
    files: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    scorer: RowScorer,
    *,
    actors: int = 1,
    id_column: str | None = "row_id",
    batch_rows: int = 1024,
    **resources: Any,
) -> dict[str, Any]:
    """What `score_shards` writes, bit for bit, by a pool of actors of Ray Data: each holds the scorer, takes a shard,
    writes its scores and takes the next.

    Joins the Ray cluster that this process is connected to, or starts one on this machine. An actor whose machine is
    lost is started anew by Ray, and its shard scored again; a shard that raises is skipped, and named when the others
    are done. After a kill or an error the same call, or `score_shards`, goes on with what is not finished.

    Args:
        files, output_dir, id_column, batch_rows: see `score_shards`. All machines must see both under these names: a
            shared folder, or URLs for `files`.
        scorer: see `score_shards`; it is pickled once for each actor.
        actors: how many at once, at most one a shard.
        resources: of each actor, as `ray.data.Dataset.map_batches` takes them: `num_cpus=`, `num_gpus=`, `memory=`.

    Returns:
        see `score_shards`.

    Raises:
        ValueError, TypeError: as `score_shards` does, before any actor starts.
        RuntimeError: naming the first shard that was not scored, and why. Finished shards stay.
        ImportError: without Ray.

    Example:
        >>> score_shards_on_ray(files, "/shared/scores", scorer, actors=16, num_gpus=1)  # doctest: +SKIP
    """
    actors = whole_number("actors", actors, 1)
    work = shard_work(files, output_dir, as_scorer(scorer), id_column, batch_rows)
    try:
        import ray.data
    except ImportError as error:
        raise ImportError('score_shards_on_ray needs Ray: pip install "ray[data]>=2.40"') from error
    count = len(work.shards)
    numbers = ray.data.from_items([{"shard": k} for k in range(count)], override_num_blocks=count)
    pool = ray.data.ActorPoolStrategy(size=min(actors, count))
    options = {"fn_constructor_args": (work,), "compute": pool, "batch_size": 1} | resources
    done = numbers.map_batches(_Finisher, **options).take_all()
    failed = sorted((int(one["shard"]), str(one["error"])) for one in done if one["error"])
    if failed:
        k, why = failed[0]
        raise RuntimeError(
            f"{len(failed)} of {count} shards were not scored, the first is {work.shards[k].file}: {why}"
        )
    work.write_manifest()
    return work.manifest()


class _Finisher:
    """An actor: finishes the shards whose numbers it gets."""

    def __init__(self, work: ShardWork) -> None:
        self.work = work

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        errors = []
        for k in batch["shard"]:
            try:
                self.work.finish(int(k))
                errors.append("")
            except Exception as error:  # the others go on, as those of other processes do
                errors.append(f"{type(error).__name__}: {error}")
        return {"shard": list(batch["shard"]), "error": errors}
