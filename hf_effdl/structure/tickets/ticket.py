"""A ticket: the units that a run had settled on early, and the smaller networks that start again from them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.groups.group import Group, check_groups
from hf_effdl.structure.slim.report import count
from hf_effdl.structure.tickets.files import State, load_ticket, push_ticket, save_ticket


@dataclass(eq=False)
class Ticket:
    """Which units of a network to keep, found early in a run, and the weights to start them from. Of `find_ticket`.

    Args:
        groups: the groups of the dense model.
        kept: ascending indices of the kept units by group name; groups not named keep all.
        step: optimizer steps after which it was found.
        settled: whether little of the selection could still change by then; so it is at the end of a path.
        distances: one row per look: `{"step", "path", "change", "distance", "ahead"}`: path time, share of the units
            in which the selection differs from the one before, the largest such share between it and those since half
            of its path time, and the share that may still change (not in tickets of 0.1.0): `EarlyTicketCallback`.
        init: where the initial weights are from: `{"sha256", "class", "source", "seed"}`: their `digest`, the model's
            class and name, and the seed of the run.
        weights: state dicts by step: 0 (the initial ones), the step found, and those asked for.

    Raises:
        ValueError: for `kept` that names other groups, or units that a group does not have.

    Example:
        >>> ticket = find_ticket(trainer, macs=0.25)       # doctest: +SKIP
        >>> small = rewind(model_init, ticket)             # doctest: +SKIP
    """

    groups: Sequence[Group]
    kept: dict[str, Tensor]
    step: int
    settled: bool = True
    distances: list[dict[str, float | None]] = field(default_factory=list)
    init: dict[str, Any] = field(default_factory=dict)
    weights: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_groups(self.groups, "Ticket")
        units = {group.name: group.units for group in self.groups}
        if not isinstance(self.kept, Mapping):
            raise TypeError(f"kept must hold indices by group name, not {type(self.kept).__name__}")
        for name, index in self.kept.items():
            if name not in units:
                raise ValueError(f"kept names group {name!r}, which is not among the ticket's groups {list(units)}")
            if not isinstance(index, Tensor):
                raise TypeError(f"kept[{name!r}] must be a tensor of indices, not {type(index).__name__}")
            inside = index.ndim == 1 and len(index) > 0 and index.dtype == torch.int64
            if not (inside and 0 <= index.min() and index.max() < units[name] and bool((index.diff() > 0).all())):
                raise ValueError(
                    f"kept[{name!r}] must hold ascending indices (int64) of the group's {units[name]} "
                    f"units, at least one; got {index}"
                )

    def report(self) -> dict[str, Any]:
        """What the ticket leaves of the model: `{"macs": {"before", "after", "ratio"}, "params", "units", ...}`.

        MACs are of one input row, counted from the shapes.
        """
        return {**count(self.groups, self.kept), "step": self.step, "settled": self.settled}

    # ---- files

    def save_pretrained(self, folder: str | os.PathLike[str], weights: bool = True) -> Path:
        """Write the ticket into a folder: JSON, safetensors and a card, each file at once or not at all.

        Args:
            folder: made where it does not exist.
            weights: False leaves the weights out; `rewind` then needs the initial ones, and knows them by their
                digest.

        Returns:
            The folder.
        """
        return save_ticket(self, folder, weights)

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
    ) -> "Ticket":
        """Read a ticket from a folder or from a repository on the Hub.

        Args:
            folder_or_repo: what `save_pretrained` wrote, or the repository id that `push_to_hub` was given.
            revision: branch, tag or commit of the repository.
            token: for a private repository.

        Raises:
            FileNotFoundError: where there is no ticket.
            ValueError: for files that are damaged or do not belong together.
        """
        return cls(**load_ticket(folder_or_repo, revision, token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        weights: bool = True,
        commit_message: str = "Ticket",
    ) -> str:
        """Push the ticket to a model repository in one commit; a card of something else that is there stays.

        Returns:
            The commit's URL.
        """
        return push_ticket(self, repo_id, private, token, weights, commit_message)
