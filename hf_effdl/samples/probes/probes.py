"""The models that are asked how sure they are of each row."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn

from hf_effdl.samples.drawing.checks import check_seed
from hf_effdl.samples.drawing.presets import Trial
from hf_effdl.samples.probes.decisions import task_of
from hf_effdl.samples.probes.inputs import Inputs, run_model
from hf_effdl.samples.scores.noise import fit_label_noise


LEAST_PROBES = 2


@dataclass
class ProbeSet:
    """What probes were trained on.

    Attributes:
        rows: the labelled rows.
        labels: `(n,)` classes.
        counts: `(M, n)` how often each probe saw each row; a row with 0 is out of bag for that probe.
    """

    rows: Dataset
    labels: Tensor
    counts: Tensor


class Probes:
    """A few models of the same classes, and how rows are fed to them.

    Args:
        models: two or more, better eight, trained on different samples of the same labelled rows.
        processing_class: the tokenizer or image processor, if the rows hold raw texts or images.
        input_column: the column(s) to feed; default: found by the models' signature and the processing class.
        data_collator: turns rows without labels into the models' inputs, instead of all this.
        names: class names; default: those of the models' configs.
        probe_set: what they were trained on; then the accuracy of a small training set can be tried out.
        task: what they decide about a row: `"classes"` (one class), `"labels"` (yes or no for each of several labels,
            sigmoid heads) or `"tokens"` (a class for each token). Scores of the last two are means over a row's labels
            or tokens. Default: what the models' configs (`problem_type`) and class names say.

    Raises:
        ValueError: for fewer than two models, models with different classes, or models of different tasks.

    Example:
        >>> probes = Probes([nn.Linear(4, 3) for _ in range(8)], input_column="features")
        >>> len(probes)
        8
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        processing_class: Any = None,
        input_column: str | Sequence[str] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        names: Sequence[str] | None = None,
        probe_set: ProbeSet | None = None,
        task: str | None = None,
    ) -> None:
        if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
            raise TypeError(f"models is a {type(models).__name__} of something else: pass a list of trained models")
        self.models = list(models)
        if len(self.models) < LEAST_PROBES:
            raise ValueError(
                f"{len(self.models)} probe(s): the spread of one model is unknown; pass 2 or more, "
                "better 8, trained on different bootstrap samples, see train_probes"
            )
        self.task = task_of(self.models, task)
        self.names = list(names) if names is not None else common_names(self.models)
        self.inputs = Inputs(processing_class, input_column, data_collator)
        self.probe_set = probe_set

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        classes = "" if self.names is None else f", {len(self.names)} classes"
        rows = "" if self.probe_set is None else f", trained on {len(self.probe_set.labels):,} rows"
        return f"{type(self).__name__}({len(self)} x {self.kind}{classes}{rows})"

    def to(self, device: torch.device) -> Self:
        """Move all models."""
        for model in self.models:
            model.to(device)
        return self

    def bind(self, data: Dataset) -> Inputs:
        """How this data set's rows are fed."""
        return self.inputs.bind(data, self.models[0])

    @torch.no_grad()
    def logits(self, inputs: Any) -> Tensor:
        """`(B, M, C)` raw logits of one batch of inputs (`(B, M, 1)` for sigmoid heads); of tokens `(B, M, T, C)`."""
        outputs = []
        for model in self.models:
            output = run_model(model, inputs)
            z = output if isinstance(output, Tensor) else output["logits"]
            outputs.append(z[:, None] if z.ndim == 1 else z)
        shapes = {tuple(z.shape) for z in outputs}
        if len(shapes) > 1 or outputs[0].ndim != (3 if self.task == "tokens" else 2):
            raise ValueError(
                f"the probes give logits of shapes {sorted(shapes)}; selection needs one row of logits "
                "for each example, over the same classes, or with Probes(models, task='tokens') one for each token"
            )
        return torch.stack(outputs, 1)

    def answer(self, inputs: Any) -> dict[str, Tensor]:
        """`logits` of one batch, and what else is worth keeping of its rows."""
        return {"logits": self.logits(inputs)}

    def remember(self, marks: Tensor, answers: dict[str, Tensor]) -> None:
        """Keep what `answer` gave of rows beside their logits, by their `row_marks`."""

    @property
    def kind(self) -> str:
        """What one of them is."""
        return type(self.models[0]).__name__

    @property
    def fingerprint(self) -> str:
        """A hash of all weights and of what is done with them: names the probes in a report and in cached scores.

        Made anew each time, as weights can be changed in place.
        """
        return weights_hash(self.models)

    def describe(self) -> dict[str, Any]:
        """Plain values for the report."""
        probe_set = self.probe_set
        return {
            "kind": self.kind,
            "number": len(self),
            "fingerprint": self.fingerprint,
            "training_rows": None if probe_set is None else len(probe_set.labels),
            "bootstrap": None if probe_set is None else bool((probe_set.counts != 1).any()),
        }

    def fit(self, rows: Dataset, labels: Tensor, weights: Tensor, seed: int) -> nn.Module | None:
        """A model like the probes, trained on other rows; None if it is not known how they were trained."""
        return None

    def out_of_bag(self, batch_size: int = 64) -> Tensor:
        """Mean prediction for each row of the probe set by the probes that were not trained on it.

        Returns:
            `(n, C)`; NaN for rows that every probe has seen.
        """
        if self.probe_set is None:
            raise ValueError("these probes do not know what they were trained on; pass probe_set=")
        unseen = self.probe_set.counts.T == 0
        p = torch.cat([z.softmax(2) for z in self.batches(self.probe_set.rows, batch_size)])
        return (p * unseen[..., None]).sum(1) / unseen.sum(1, keepdim=True)

    def batches(self, data: Dataset, batch_size: int) -> Iterator[Tensor]:
        """Logits of a data set on this process alone, batch by batch, on the CPU."""
        for _, z in self.asked(data, batch_size):
            yield z if z.shape[2] > 1 else torch.cat([torch.zeros_like(z), z], 2)

    def asked(self, data: Dataset, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
        """What is fed of a data set, and the logits as the models give them, on the CPU; on this process alone."""
        inputs, device = self.bind(data), Accelerator().device
        self.to(device)
        for start in range(0, len(data), batch_size):
            fed = inputs(inputs.read(data, range(start, min(start + batch_size, len(data)))))
            yield fed, self.logits(send_to_device(fed, device)).float().cpu()

    def trial(self, pool: Dataset, labels: Tensor, batch_size: int = 64) -> Trial | None:
        """`(positions, weights) -> accuracy` on the probe set of a model trained on these rows of the pool.

        Rows of the probe set whose own label the other probes find unlikely (`p_clean < 1/2`) are left out. None if
        it is not known what the probes were trained on, or how.
        """
        if self.probe_set is None or type(self).fit is Probes.fit:
            return None
        p, truth = self.out_of_bag(batch_size), self.probe_set.labels
        likely, judged = torch.ones(len(truth), dtype=torch.bool), ~p[:, 0].isnan()
        if judged.any():
            noise = fit_label_noise(p[judged], truth[judged])
            likely[judged] = noise.p_clean(p[judged], truth[judged]) >= 0.5
        rows, truth = self.probe_set.rows.select(likely.nonzero().flatten().tolist()), truth[likely]
        seeds = iter(range(1000, 2000))

        def accuracy(positions: Tensor, weights: Tensor) -> float:
            model = self.fit(pool.select(positions.tolist()), labels[positions], weights, next(seeds))
            return self._accuracy(model, rows, truth, batch_size)

        return accuracy

    def _accuracy(self, model: Any, rows: Dataset, truth: Tensor, batch_size: int) -> float:
        twice = Probes([model, model], names=self.names or [])
        twice.inputs = self.inputs
        predicted = torch.cat([z[:, 0].argmax(1) for z in twice.batches(rows, batch_size)])
        return (predicted == truth).double().mean().item()


def common_names(models: Sequence[nn.Module]) -> list[str] | None:
    """The class names in the models' configs; None if they have none.

    Raises:
        ValueError: if two models name their classes differently.
    """
    maps = [
        {int(i): name for i, name in (getattr(getattr(model, "config", None), "id2label", None) or {}).items()}
        for model in models
    ]
    for number, other in enumerate(maps):
        if other != maps[0]:
            raise ValueError(
                f"probe {number} maps classes to labels as {_short(other)}, probe 0 as {_short(maps[0])}; load or "
                "train all probes with the same id2label"
            )
    names = [maps[0][i] for i in sorted(maps[0])]
    return None if not names or names[0].startswith("LABEL_") else names


def _short(names: dict[int, str]) -> str:
    shown = dict(list(names.items())[:4])
    return f"{shown}{' ...' if len(names) > 4 else ''} ({len(names)} classes)"


def weights_hash(models: Sequence[nn.Module], *tensors: Tensor) -> str:
    """A short hash of all parameters and buffers, the architectures, their plain attributes and their code."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + _bytes(tensor))
    for model in models:
        digest.update(_architecture(model).encode())
        # the state holds what modules add to it, the buffers also those that are not saved
        for name, tensor in sorted((dict(model.named_buffers()) | _tensors(model.state_dict())).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + _bytes(tensor))
    return digest.hexdigest()[:16]


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


# Entries of a config, and attributes, that say where a model comes from, or what the last training left.
_NO_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "problem_type", "dtype", "use_cache")
_NO_ATTRIBUTES = ("training", "name_or_path", "gradient_checkpointing")


def _architecture(model: nn.Module) -> str:
    """What a model does with its weights: its modules, their attributes, its settings, and code that is at hand."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(settings, dict):
        settings = {name: value for name, value in settings.items() if name not in _NO_SETTINGS}
    attributes = {name: plain for name, module in model.named_modules() if (plain := _attributes(module))}
    code = sorted({_code(kind) for module in model.modules() for kind in type(module).__mro__[:-2]})
    parts = (json.dumps(part, default=str, sort_keys=True) for part in (settings, attributes, code))
    return "\n".join([repr(model), *parts])


def _attributes(module: nn.Module) -> dict[str, str]:
    """What plain values a module has as attributes: the same texts for the same values in every run."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    described = {name: _described(value) for name, value in public.items() if name not in _NO_ATTRIBUTES}
    # what the class says as well is in its code; such is a `forward` that was wrapped and kept its name
    own = {name: _described(getattr(type(module), name, None)) for name in described}
    return {name: text for name, text in described.items() if text not in (None, own[name])}


def _described(value: Any) -> str | None:
    """A plain value, or a tensor or function, as a text; None for what has none that stays the same."""
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"
    if isinstance(value, list | tuple):
        texts = [_described(one) for one in value]
        return None if None in texts else repr(texts)
    if inspect.isroutine(value):
        return _code(getattr(value, "__func__", value))
    plain = value is None or isinstance(value, bool | int | float | complex | str | np.generic | torch.dtype)
    return repr(value) if plain else None


@cache
def _code(part: Any) -> str:
    """The source of a class or function; where it stands if that is not at hand."""
    name = getattr(part, "__qualname__", "")
    try:
        # without the module, which has another name when it is run as a script
        return f"{name}\n{inspect.getsource(part)}"
    except (OSError, TypeError):
        return f"{getattr(part, '__module__', '')}.{name}"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bootstrap_counts(rows: int, probes: int, seed: int = 0, bootstrap: bool = True) -> Tensor:
    """`(M, n)` how often each probe sees each row: draws with replacement, or 1 everywhere.

    Example:
        >>> bootstrap_counts(5, 2).sum(1)
        tensor([5, 5])
    """
    seed = check_seed(seed)
    if not bootstrap:
        return torch.ones(probes, rows, dtype=torch.long)
    draws = [
        torch.randint(rows, (rows,), generator=torch.Generator().manual_seed((seed * 1000 + m) % 2**63)).bincount(
            minlength=rows
        )
        for m in range(probes)
    ]
    return torch.stack(draws)
