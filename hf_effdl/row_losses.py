"""The loss of every row of a batch: the terms that the losses of transformers average, before they are averaged."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


COLUMN = "weight"
IGNORED = -100  # the label that counts nowhere in transformers
CLASSIFICATION = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))
GENERATION = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
ASK = (
    "pass compute_loss_func=f, where f(outputs, labels, num_items_in_batch) returns one loss per row, or remove the "
    f"column {COLUMN!r}"
)


def element_losses(logits: Tensor, labels: Tensor, task: str, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The terms that the losses of transformers average, not yet averaged, and which of them count.

    ==============================  ==================  ============  ==========================================
    task                            logits              labels        terms of a row
    ==============================  ==================  ============  ==========================================
    `single_label_classification`   (B, C)              (B,)          one cross entropy
    `multi_label_classification`    (B, C)              (B, C)        C binary cross entropies
    `regression`                    (B, C), (B, 1)      (B, C), (B,)  C squared errors
    `tokens`                        (B, T, C)           (B, T)        a cross entropy per label
    `next_tokens`                   (B, T, C)           (B, T)        a cross entropy per label but the first
    ==============================  ==================  ============  ==========================================

    Terms whose label is -100 do not count. Half-precision logits are taken to float32 first.

    Args:
        logits, labels: as above, any integer or floating dtype.
        task: a line of the table.
        label_smoothing: eps of `(1 - eps) * nll + eps * mean over classes of -log p`, for cross entropies.

    Returns:
        Terms and mask, both of shape (B, terms per row); terms that do not count are 0.

    Raises:
        ValueError: if the shapes do not fit the task, or label smoothing is asked of a task without classes.

    Example:
        >>> terms, counted = element_losses(torch.zeros(2, 3, 4), torch.tensor([[0, 1, -100], [2, 3, 0]]), "tokens")
        >>> (terms / torch.tensor(4.0).log()).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    labels = labels.to(logits.device)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    fits = {
        "single_label_classification": logits.ndim == 2 and labels.numel() == len(logits),
        "tokens": logits.ndim == 3 and logits.shape[:2] == labels.shape,
        "next_tokens": logits.ndim == 3 and logits.shape[:2] == labels.shape,
    }.get(task, logits.numel() == labels.numel())
    if not fits:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit {task}; {ASK}")
    if task in ("regression", "multi_label_classification"):
        if label_smoothing:
            raise ValueError(f"label_smoothing_factor={label_smoothing} has no meaning for {task}; set it to 0")
        loss = F.mse_loss if task == "regression" else F.binary_cross_entropy_with_logits
        terms = loss(logits, labels.reshape(logits.shape).to(logits.dtype), reduction="none").reshape(len(logits), -1)
        return terms, torch.ones_like(terms, dtype=torch.bool)
    if task == "next_tokens":
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # moving the labels copies less than slicing the logits
    labels = labels.reshape(len(logits), -1).long()
    terms = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return terms.view_as(labels), labels != IGNORED


def find_task(model: nn.Module, logits: Tensor, labels: Tensor) -> str:
    """The line of `element_losses` that a model trains on.

    Decided as transformers does: by the kind of head that the model's class names, then `config.problem_type`; for
    classes that name none, by shape, where only one line fits.

    Raises:
        ValueError: if the loss of that head has no per-row form here, or the shapes do not decide.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    name, config, kind = type(model).__name__, getattr(model, "config", None), getattr(model, "loss_type", None)
    if kind in GENERATION or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        # an encoder-decoder shifts what the decoder reads, not the labels
        return "tokens" if getattr(config, "is_encoder_decoder", False) else "next_tokens"
    if kind in ("ForTokenClassification", "ForMaskedLM"):
        return "tokens"
    if kind in CLASSIFICATION and getattr(config, "problem_type", None) is not None:
        return config.problem_type  # where the user left it open, the model has set it when it saw the labels
    task = _task_by_shape(logits, labels) if kind is None or kind in CLASSIFICATION else None
    if task is None:
        raise ValueError(
            f"no loss per row is known for {name} with logits {tuple(logits.shape)} and {labels.dtype} labels "
            f"{tuple(labels.shape)}; {ASK}"
        )
    return task


def _task_by_shape(logits: Tensor, labels: Tensor) -> str | None:
    """The line of `element_losses` that alone fits, if there is one."""
    if labels.is_floating_point():
        return "regression" if logits.numel() == labels.numel() == len(logits) else None
    if logits.ndim == 2 and logits.shape[1] > 1 and labels.shape == logits.shape[:1]:
        return "single_label_classification"
    return "tokens" if logits.ndim == 3 and labels.shape == logits.shape[:2] else None
