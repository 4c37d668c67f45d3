"""Distillation: a student trains on the outputs of a frozen teacher beside its own loss."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_effdl.checks import real_number
from hf_effdl.files import digest
from hf_effdl.processes import refuse_lone_processes
from hf_effdl.row_losses import COLUMN, IGNORED, find_task
from hf_effdl.weighting import WeightedLossMixin


MARK = "TeacherMark"


def distillation_terms(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, temperature: float = 2.0, shifted: bool = False
) -> tuple[Tensor, Tensor]:
    """What a student's outputs lack of the teacher's, per row and position, and which of these count.

        classes, one per label:   T^2 KL(softmax(teacher / T) || softmax(student / T))
        other outputs:            mean of (student - teacher)^2 over a row

    T^2 keeps the gradient's size whatever T. Classes are told by integer labels of the shape of the outputs without
    their last axis; positions whose label is -100 do not count.

    Args:
        student, teacher: outputs of one shape, such as (B, C) or (B, T, C).
        labels: of the student's own loss.
        temperature: T, > 0.
        shifted: whether the output at a position is for the label of the next, as in causal language models.

    Returns:
        Terms and mask, both of shape (B, terms per row), float32 or wider.

    Raises:
        ValueError: outputs of two shapes.

    Example:
        >>> distillation_terms(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]))
        (tensor([[0.]]), tensor([[True]]))

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's outputs have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: give "
            "a teacher with the same classes"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if labels is None or labels.is_floating_point() or labels.shape != student.shape[:-1] or student.shape[-1] < 2:
        terms = (student - teacher).square().flatten(1).mean(1, keepdim=True)
        return terms, torch.ones_like(terms, dtype=torch.bool)
    counted = labels.to(student.device) != IGNORED
    if shifted:
        counted = F.pad(counted[:, 1:], (0, 1), value=False)
    said, taught = (F.log_softmax(outputs / temperature, -1) for outputs in (student, teacher))
    terms = temperature**2 * F.kl_div(said, taught, reduction="none", log_target=True).sum(-1)
    return terms.reshape(len(terms), -1), counted.reshape(len(terms), -1)


def hidden_terms(student: Any, teacher: Any) -> Tensor:
    """What hidden states lack of the teacher's, `||h - h'||^2 / ||h'||^2` at every position, mean over the layers.

    Relative, because a few positions have states many times as large as others.

    Returns:
        Shape (B, T) for hidden states (B, T, D), else (B, 1).

    Raises:
        ValueError: a model without hidden states, or with those of other shapes.
    """
    mine, theirs = (getattr(outputs, "hidden_states", None) for outputs in (student, teacher))
    if not mine or not theirs or [h.shape for h in mine] != [h.shape for h in theirs]:
        raise ValueError(
            "distill_hidden= compares hidden states layer by layer, and these models return none or others in number "
            "or size: set it to 0, or take a teacher of the same depth and width"
        )
    terms = []
    for one, other in zip(mine, theirs, strict=True):
        one, other = (h.float() if h.ndim == 3 else h.float().flatten(1)[:, None] for h in (one, other))
        whole = other.square().sum(-1).clamp_min(torch.finfo(other.dtype).tiny)
        terms.append((one - other).square().sum(-1) / whole)
    return torch.stack(terms).mean(0)


@dataclass
class Distillation:
    """A teacher and how much its outputs count.

        loss = (1 - weight) own loss + weight distillation_terms + hidden hidden_terms

    Args:
        teacher: any model that takes the student's inputs; put into evaluation mode and frozen.
        weight: share of the teacher, in [0, 1].
        temperature: see `distillation_terms`.
        hidden: factor on `hidden_terms`, not negative; 0 leaves hidden states out.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> Distillation(torch.nn.Linear(2, 2), weight=0.5).weight
        0.5
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        check_distillation(self.weight, self.temperature, self.hidden)
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher is a {type(self.teacher).__name__}: pass the model to learn from")
        self.teacher.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Tells teachers with other weights apart, from the first entries of every tensor."""
        state = self.teacher.state_dict()
        return digest(f"{name} {value.flatten()[:16].double().tolist()}".encode() for name, value in state.items())


def check_distillation(weight: float, temperature: float, hidden: float) -> None:
    """Refuse numbers out of range, by the names of the arguments."""
    if not 0 <= real_number("distill", weight) <= 1:
        raise ValueError(f"distill={weight}: it is the teacher's share of the loss, in [0, 1]")
    if not 0 < real_number("distill_temperature", temperature) < float("inf"):
        raise ValueError(f"distill_temperature={temperature}: it must be a positive finite number")
    if not 0 <= real_number("distill_hidden", hidden) < float("inf"):
        raise ValueError(f"distill_hidden={hidden}: it must be finite and not negative")


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model to teach with."""
    return deepcopy(model).eval().requires_grad_(False)


class DistillationMixin:
    """Makes a `Trainer` with `WeightedLossMixin` train on what a teacher says as well; see `Distillation`.

    The teacher's part is scaled as the loss beside it: by the micro batches of a step, their counted labels, the
    weights of a column `weight`. Evaluation has the student's own loss alone. The teacher is in no checkpoint: a
    resumed run must be given it again, and one with other weights is refused.
    """

    distillation: Distillation | None = None
    _given_teacher: nn.Module | None = None

    def take_teacher(self, teacher: nn.Module | None = None) -> None:
        """Have a teacher, or a copy of the model as it is now, teach, if the arguments (`distill`, ...) ask for it."""
        args, self._given_teacher = self.args, teacher
        if teacher is not None and not args.distills:
            raise ValueError("teacher= has no say with distill=0: set distill, such as 0.5, or leave the teacher out")
        if args.distills:
            teacher = frozen_copy(self.model) if teacher is None else teacher
            self.teach(Distillation(teacher, args.distill, args.distill_temperature, args.distill_hidden))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`; the new model is its own teacher where the one before was."""
        model = super().call_model_init(trial)
        if self.distillation is not None and self._given_teacher is None and getattr(self.args, "distills", False):
            self.model = model
            self.take_teacher()
        return model

    def teach(self, distillation: Distillation) -> None:
        """Train with this teacher from now on."""
        self.distillation = distillation
        distillation.teacher.to(self.args.device)
        self.remove_callback(TeacherMark)
        self.add_callback(TeacherMark(distillation.fingerprint()))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As in `Trainer`; in training, with the teacher's part."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        more = {"output_hidden_states": True} if self.distillation.hidden else {}
        taught = self._taught({**inputs, **more})
        loss, outputs = super().compute_loss(model, {**inputs, **more}, True, num_items_in_batch)
        loss = (1 - self.distillation.weight) * loss
        loss = loss + self._teachers_part(model, inputs, outputs, taught, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _taught(self, inputs: Mapping[str, Any]) -> Any:
        inputs = {name: value for name, value in inputs.items() if name not in (COLUMN, "labels")}
        with self.accelerator.autocast():
            return self.distillation.teacher(**inputs)

    def _teachers_part(
        self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any, taught: Any, items: Tensor | int | None
    ) -> Tensor:
        """The teacher's part of a micro batch, in the scale of the loss beside it."""
        labels, weights, by = inputs.get("labels"), inputs.get(COLUMN), self.distillation
        mine, theirs = _logits(outputs), _logits(taught)
        shifted = _is_shifted(self.accelerator.unwrap_model(model), mine, labels)
        terms, counted = distillation_terms(mine, theirs, labels, temperature=by.temperature, shifted=shifted)
        terms = by.weight * terms
        if by.hidden:
            terms = terms + by.hidden * _fitted(hidden_terms(outputs, taught), terms, inputs.get("attention_mask"))
        dim = None if weights is None else 1
        part = (terms * counted).sum(dim) / counted.sum(dim).clamp(min=1)
        if weights is not None:
            return self.weighted_share(weights, part, items)
        if items is None:  # Trainer divides by the micro batches
            return part
        own = counted.sum() if counted.shape[1] > 1 else (labels != IGNORED).sum()
        return part * own / items * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)


class DistillationTrainer(DistillationMixin, WeightedLossMixin, Trainer):
    """A `Trainer` that trains on what a teacher says as well, a slim model on its dense one, say.

    Args:
        distillation: the teacher and how much it counts.

    All other arguments are those of `Trainer`.

    Example:
        >>> Trainer = DistillationTrainer                                                       # doctest: +SKIP
        >>> Trainer(small, args, train_dataset=rows, distillation=Distillation(dense)).train()  # doctest: +SKIP
    """

    @wraps(Trainer.__init__)
    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_lone_processes()
        self.teach(distillation)


class TeacherMark(TrainerCallback, ExportableState):
    """Notes in every checkpoint which teacher it was trained with, and refuses to resume with another."""

    def __init__(self, teacher: str) -> None:
        self.teacher = teacher

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        return {"args": {"teacher": self.teacher}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(MARK)
        if saved is not None and saved["args"]["teacher"] != self.teacher:
            raise ValueError(
                "this checkpoint was trained with another teacher than the one given now: resume with the same, which "
                "is in no checkpoint. By default it is the model as it was given to the trainer at the start, so give "
                "that again, from the same pretrained weights, or pass teacher="
            )


def refuse_without_teacher(state: TrainerState) -> None:
    """Refuse to go on without a teacher where a checkpoint was trained with one."""
    if MARK in state.stateful_callbacks:
        raise ValueError(
            "this checkpoint was trained by distillation, and the run that resumes it has no teacher: pass the same "
            "distill= and the model at the start, or the same teacher="
        )


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"distillation compares logits, and these outputs have {list(outputs)}: set distill=0, or train with a "
            "compute_loss of your own"
        )
    return logits


def _fitted(hidden: Tensor, terms: Tensor, mask: Any) -> Tensor:
    """Terms of hidden states beside those of outputs: by position as they are, or the mean over the mask of a row."""
    if hidden.shape == terms.shape:
        return hidden
    attended = mask.to(hidden) if isinstance(mask, Tensor) and mask.shape == hidden.shape else torch.ones_like(hidden)
    return (hidden * attended).sum(1, keepdim=True) / attended.sum(1, keepdim=True).clamp(min=1)


def _is_shifted(model: nn.Module, logits: Tensor, labels: Any) -> bool:
    if not isinstance(labels, Tensor) or logits.ndim != 3 or labels.shape != logits.shape[:2]:
        return False
    try:
        return find_task(model, logits, labels) == "next_tokens"
    except ValueError:  # a head without a known loss per row has one label per position
        return False
