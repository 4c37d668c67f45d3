"""Models of several sizes from one run, in one repository: each budget a revision, one card with the curve."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import create_branch, create_repo, upload_folder
from torch import nn
from transformers import PreTrainedModel

from hf_effdl.checks import one_of, path, real_number
from hf_effdl.files import locked, write_whole
from hf_effdl.pictures import LINE, bare, figure
from hf_effdl.structure.groups.finders.lora import has_adapter
from hf_effdl.structure.slim.family import FILE_NAME, config_digest, family_record, write_family
from hf_effdl.structure.slim.report import get_report


BUDGETS = ("macs", "params", "latency", "keep")
PICTURE = "family.png"


def check_loadable(model: nn.Module) -> None:
    """Refuse to save what `from_pretrained` could not load."""
    if not isinstance(model, PreTrainedModel) and not has_adapter(model):
        raise TypeError(
            f"{type(model).__name__} is no transformers model, so it has no config to load it by; save its "
            "state_dict yourself, or wrap the net in a PreTrainedModel"
        )


class FamilyMixin:
    """`save_family` and `push_family` for a `SplitLBITrainer`."""

    def save_family(
        self,
        budgets: Sequence[float] | Mapping[float, nn.Module],
        folder: str | os.PathLike[str],
        *,
        budget: str = "macs",
        options: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        **card: Any,
    ) -> list[str]:
        """Save models of several sizes into a folder: each in one named by its revision, the largest at the top too.

        Args:
            budgets: shares of the dense model, such as `[0.75, 0.5, 0.25]`; or models from `slim` by their share, as
                they are, which may have been trained on since.
            folder: is filled; `family.json` in it says sizes and metrics, see `choose`. The best is that of the best
                `metric_for_best_model` of the training arguments (and its `greater_is_better`), else of the first
                metric beside the loss, the higher the better, else of the lowest loss.
            budget: what the shares are of: `"macs"`, `"params"`, `"latency"` or `"keep"`.
            options: further arguments of `slim`, where it makes the models.
            repo_id: repository named in the cards; default: the folder's name.
            **card: of `create_model_card`; with `dataset` the cards have a `model-index`, with
                `benchmark` (see `save_slim`) also files for the leaderboards of the Hub.

        Returns:
            The revisions, such as `["macs-0.75", "macs-0.5", "macs-0.25"]`, the largest first.

        Raises:
            ValueError, TypeError: for shares that are none or occur twice, before anything is slimmed; and as `slim`.
        """
        target, told = path("folder", folder), self.results
        if target.exists() and not target.is_dir():
            raise ValueError(f"folder={os.fspath(folder)!r} is a file: name a folder")
        members = self._members(budgets, budget, options or {})
        facts = [self._member(revision, small) for revision, small in members.items()]
        self.results = (told or self._whole()) | {row["revision"]: self._row(row) for row in facts}
        details = {"repo_id": repo_id or target.name, "model_name": (repo_id or target.name).split("/")[-1], **card}
        try:
            with locked(target, ".lock-family"):
                (target / FILE_NAME).unlink(missing_ok=True)  # written last: it says that all of these are there
                for row, (revision, small) in zip(facts, members.items(), strict=True):
                    self.save_slim(small, target / revision, revision=revision, **details)
                    row["config"] = config_digest(target / revision)
                largest = next(iter(members.values()))
                picture = self._draw_family(facts, target)
                self.save_slim(largest, target, family=list(members), family_picture=picture, **details)
                metric, greater = self._metric_of(facts)
                write_family(target, family_record(facts, metric, self._latency_inputs(32), greater))
        finally:
            self.results = told
        return list(members)

    def push_family(
        self,
        budgets: Sequence[float] | Mapping[float, nn.Module],
        repo_id: str,
        *,
        private: bool | None = None,
        **settings: Any,
    ) -> dict[str, str]:
        """Push models of several sizes to one repository: each budget a revision, on `main` the card and the largest.

        `main` comes last, so that `family.json` names only what is there. A push that was cut off can be repeated.

        Args:
            budgets: see `save_family`.
            repo_id: made where it does not exist.
            private: whether it is then private.
            **settings: see `save_family`.

        Returns:
            The URL of each revision's commit, `{"macs-0.5": ..., "main": ...}`.

        Example:
            >>> trainer.push_family([0.75, 0.5, 0.25], "your-name/family")                    # doctest: +SKIP
            >>> name = choose("your-name/family", latency_ms=5.0)                             # doctest: +SKIP
            >>> AutoModelForImageClassification.from_pretrained("your-name/family", revision=name)  # doctest: +SKIP
        """
        token = self.args.hub_token
        with tempfile.TemporaryDirectory() as folder:
            self._members_checked(budgets, settings.get("budget", "macs"))
            repo_id = create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
            revisions = self.save_family(budgets, folder, repo_id=repo_id, **settings)
            upload = partial(upload_folder, repo_id=repo_id, token=token)
            urls = {}
            for revision in revisions:
                create_branch(repo_id, branch=revision, exist_ok=True, token=token)
                message = f"Slim model of the budget {revision}"
                done = upload(folder_path=f"{folder}/{revision}", revision=revision, commit_message=message)
                urls[revision] = str(done)
            inside = [f"{revision}/**" for revision in revisions]
            done = upload(folder_path=folder, ignore_patterns=inside, commit_message="A family of slim models")
        return urls | {"main": str(done)}

    # ---- the members

    def _members_checked(self, budgets: Any, budget: str) -> dict[float, nn.Module | None]:
        one_of("budget", budget, BUDGETS)
        self._check_trained("push_family")
        if self.args.world_size > 1:
            raise ValueError(
                f"this is one of {self.args.world_size} processes, and a family is saved by one: push_slim a model of "
                "each budget, or train on one process"
            )
        if isinstance(budgets, str | bytes) or not isinstance(budgets, Mapping | Sequence) or not len(budgets):
            raise TypeError(f"budgets={budgets!r}: pass a list of shares, such as [0.75, 0.5, 0.25]")
        shares = [real_number("budgets", share) for share in budgets]
        if len(set(shares)) < len(shares) or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"budgets={list(budgets)}: they must be different shares in (0, 1]")
        if len({_revision(budget, share) for share in shares}) < len(shares):
            raise ValueError(f"budgets={list(budgets)}: two of them have one name, {_revision(budget, max(shares))!r}")
        models = list(budgets.values()) if isinstance(budgets, Mapping) else [None] * len(shares)
        if None in models:
            check_loadable(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        for model in models:
            if model is not None and not (isinstance(model, PreTrainedModel) and get_report(model)):
                raise TypeError(f"budgets holds a {type(model).__name__} that is no transformers model from slim")
        return dict(sorted(zip(shares, models, strict=True), reverse=True))

    def _members(self, budgets: Any, budget: str, options: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The models by revision, the largest first."""
        shares = self._members_checked(budgets, budget)
        made = {
            share: self.slim(**{budget: share}, **options) if model is None else model
            for share, model in shares.items()
        }
        return {_revision(budget, share): model for share, model in made.items()}

    def _member(self, revision: str, small: nn.Module) -> dict[str, Any]:
        """A member's entry in the record."""
        report = get_report(small) or {}
        metrics = self.evaluate_model(small) if self.eval_dataset is not None else {}
        sizes = {name: report[name]["after"] for name in ("macs", "params", "latency_ms") if name in report}
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}  # as JSON wants them
        return {"revision": revision, "class": type(small).__name__, **sizes, "metrics": numbers}

    def _whole(self) -> dict[str, dict[str, float]]:
        metrics = self.evaluate_model(self.plain_model()) if self.eval_dataset is not None else {}
        return {"dense": {**metrics, **self.groups[0].network.count()}}

    def _row(self, member: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {name: member[name] for name in ("params", "macs", "latency_ms") if name in member}
        return {**member["metrics"], **sizes}

    def _draw_family(self, facts: Sequence[Mapping[str, Any]], folder: Path) -> str | None:
        """The metric over the MACs, as a picture in the folder; None without matplotlib or metrics."""
        metric, _ = self._metric_of(facts)
        if metric is None:
            return None
        try:
            picture = figure(6, 3.6)
        except ImportError:  # matplotlib is an extra
            return None
        axis = picture.subplots()
        bare(axis)
        whole = self.groups[0].network.count()["macs"]
        dense = self.results.get("dense", {}).get(metric)
        points = [(row["macs"] / whole, row["metrics"][metric]) for row in facts]
        points = ([(1.0, dense)] if dense is not None else []) + points
        axis.plot(*zip(*points, strict=True), "o-", color=LINE)
        for row, point in zip(facts, points[-len(facts) :], strict=True):
            axis.annotate(row["revision"], point, xytext=(6, -10), textcoords="offset points", fontsize=8)
        axis.margins(y=0.15)  # room for the names
        axis.set_xlabel("share of the MACs")
        axis.set_ylabel(metric)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PICTURE, partial(picture.savefig, dpi=110))
        return PICTURE

    def _metric_of(self, facts: Sequence[Mapping[str, Any]]) -> tuple[str | None, bool]:
        """The metric, which all members have, that says which is the best; and whether a higher one is better."""
        names = [name for name in facts[0]["metrics"] if all(name in row["metrics"] for row in facts)]
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if wanted in names:
            return wanted, bool(self.args.greater_is_better)
        losses = [name for name in names if name.endswith("loss")]
        others = [name for name in names if name not in losses]
        return next(iter([*others, *losses]), None), bool(others)


def _revision(budget: str, share: float) -> str:
    return f"{budget}-{share:g}"
