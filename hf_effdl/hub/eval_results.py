"""Results beside a model card, as the leaderboards of the Hub read them: `.eval_results/<benchmark>.yaml`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_effdl.files import write_whole


FOLDER = ".eval_results"


def write_eval_results(
    folder: str | os.PathLike[str],
    dataset: str,
    values: Mapping[str, float],
    *,
    source: str | None = None,
    notes: str | None = None,
) -> list[Path]:
    """One file for each task of a benchmark.

    Args:
        folder: of the model; the files lie in `.eval_results` in it.
        dataset: repository of the benchmark, `owner/name`.
        values: `{task id: value}`, the ids as in the `eval.yaml` of that repository.
        source: where the numbers come from, a URL.
        notes: how they were made, in a few words.

    Source: the Hub's page on evaluation results; entries are those of `huggingface_hub.EvalResultEntry`.
    """
    written = []
    for task, value in values.items():
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=value,
            source_url=source,
            source_name="Model card" if source else None,
            notes=notes,
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        name = re.sub(r"[^\w.-]+", "_", f"{dataset.split('/')[-1]}-{task}").lower()
        written.append(write_whole(Path(folder) / FOLDER / f"{name}.yaml", text))
    return written
