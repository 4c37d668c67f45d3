"""`WeightedSFTTrainer`: TRL's supervised fine-tuning on weights of rows, turns and tokens. Needs the extra `trl`."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_effdl.checks import instance
from hf_effdl.files import parsed
from hf_effdl.processes import refuse_lone_processes
from hf_effdl.row_losses import COLUMN, IGNORED
from hf_effdl.weighting import check_column, check_weights, columns_of, refuse_no_weights


try:
    from trl import SFTTrainer, pack_dataset
except ImportError:

    class SFTTrainer:
        """In the place of TRL's, so that the package can be looked at without it."""

        def __init__(self, *args: Any, **options: Any) -> None:
            raise ImportError('WeightedSFTTrainer needs TRL: pip install "trl>=1.16"')


TOKENS, TURNS = "token_weights", "turn_weights"
NAMES = (COLUMN, TURNS, TOKENS)


class WeightedSFTTrainer(SFTTrainer):
    """An `SFTTrainer` that trains on weights of rows, turns or tokens.

    One optimizer step descends

        loss = sum_t w_t * l_t / N        t: all tokens with a label, over rows, micro batches and processes

    where `l_t` is the cross entropy of token t and N the *number* of those tokens, as in `SFTTrainer`: weights of one
    train what it trains, and the loss is the same however the step is cut into micro batches, processes or packed
    sequences. `w_t` is the product of those columns that `train_dataset` has:

        weight           one number a row, such as a selector leaves
        turn_weights     of a conversation: a number a message of `messages`, or of `prompt` and `completion` together
        token_weights    of rows that are tokenised already: a number a token of `input_ids`

    Which tokens have a label is TRL's to say (`completion_only_loss`, `assistant_only_loss`, `labels`). A token of
    weight 0 still counts in N; to take it out, leave it without a label. Long rows weigh more than short ones, as they
    do in `SFTTrainer`: for rows that count alike divide `weight` by the number of a row's tokens, and by its mean.

    Takes the arguments of `SFTTrainer`, at least the first six also by position. Evaluation is unweighted.

    Raises:
        ValueError: for a training set without such a column, weights that are negative, not finite or of another
            length than what they weigh; a chat template by which turns cannot be told apart; what has no loss per
            token here: `loss_type="dft"`, `compute_loss_func`, label smoothing, context and sequence parallelism,
            images, and models that do not take the number of tokens of the step.
        ImportError: without TRL.

    Example:
        >>> from hf_effdl import WeightedSFTTrainer
        >>> rows = {"prompt": ["1 + 1 ="], "completion": [" 2"], "weight": [1.0]}
        >>> trainer = WeightedSFTTrainer(model, args, train_dataset=Dataset.from_dict(rows))  # doctest: +SKIP

    Source: as `WeightedTrainer`; the loss per token is TRL's.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable[[Sequence[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        instance("model", model, (str, os.PathLike, nn.Module), "a causal language model, or its id")
        self._check_data(train_dataset)
        self._check_loss(args, options.get("compute_loss_func"))
        if getattr(args, "device", None) is not None:  # asking for it joins the other processes
            refuse_lone_processes()  # before the model is loaded
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **options)
        refuse_lone_processes()
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError("context and sequence parallelism cut rows apart, and their weights not; use neither")

    def _check_data(self, dataset: Any) -> None:
        if dataset is None:
            return  # which SFTTrainer refuses
        if isinstance(dataset, Mapping):
            raise TypeError(f"train_dataset is a dict of {list(dataset)}; pass one of its splits")
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError("train_dataset has no rows; pass some to train on")
        columns = columns_of(dataset)
        transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
        if not set(NAMES) & set(columns) and not transformed:
            refuse_no_weights(dataset, type(self).__name__, "SFTTrainer", NAMES)
        if images := {"image", "images"} & set(columns):
            raise ValueError(f"train_dataset has {sorted(images)}: rows with images have no weights per token here")
        if isinstance(dataset, Dataset) and COLUMN in columns:
            check_column(dataset)

    def _check_loss(self, args: Any, own_loss: Any) -> None:
        settings = {name: getattr(args, name, None) for name in ("loss_type", "label_smoothing_factor")}
        wrong = [name for name in settings if settings[name] not in (None, "nll", 0)]
        wrong += [] if own_loss is None else ["compute_loss_func"]
        if wrong:
            raise ValueError(f"{wrong[0]} is set: what is weighted is the plain loss of each token; leave {wrong} out")

    # ---- from the data set to the batch

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Any:
        # TRL has no public way to keep a column of a packed row
        given = [name for name in NAMES if name in columns_of(dataset)]
        if not given:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if packing and args.max_length is None:
            raise ValueError("max_length=None: packing=True needs the length of a packed row")
        whole = copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        template = {"processing_class": processing_class, "chat_template": self.chat_template}
        with args.main_process_first(local=False):
            options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            dataset = dataset.map(
                weigh_tokens,
                with_indices=True,
                fn_kwargs=template,
                remove_columns=[name for name in given if name != TOKENS],
                **options,
            )
            return _cut(dataset, args, packing, options)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in (TOKENS, COLUMN) if name not in self._signature_columns]

    @contextmanager
    def _collating(self, keep: bool) -> Iterator[None]:
        plain = self.data_collator
        self.data_collator = TokenWeightCollator(plain, keep)
        try:
            yield
        finally:
            self.data_collator = plain

    def get_train_dataloader(self) -> DataLoader:
        with self._collating(keep=True):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._collating(keep=False):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._collating(keep=False):
            return super().get_test_dataloader(test_dataset)

    # ---- from the batch to the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As in `SFTTrainer`; of a batch with weights, this process's share of the step's weighted loss."""
        inputs = dict(inputs)
        weights = inputs.pop(TOKENS, None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise ValueError(
                f"{type(self.accelerator.unwrap_model(model)).__name__} takes no number of tokens (its forward has no "
                "**kwargs), so a step of several micro batches has no mean over its tokens; use another model class"
            )
        weighted = _Weighted(model, weights)
        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)


@dataclass
class _Weighted:
    """A model whose log-probabilities of tokens come multiplied by weights, `(rows, tokens)` as the labels are."""

    model: nn.Module
    weights: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is not None:  # of every token but the first
            outputs.log_probs = log_probs * self.weights[:, 1:].to(log_probs)
        return outputs


@dataclass
class TokenWeightCollator:
    """A collator that never shows weights to the one it wraps, and lays them out as that one laid out the tokens."""

    collator: Callable[[Sequence[Any]], Any]
    keep: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator([{name: value for name, value in row.items() if name not in NAMES} for row in rows])
        if not self.keep:
            return batch
        weights = [_weights_of(row) for row in rows]
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        there = _laid_out([torch.ones_like(one) for one in ids], batch["labels"]).bool()
        moved = not torch.equal(_laid_out(ids, batch["labels"])[there], batch["input_ids"][there])
        if moved:
            raise ValueError(
                "data_collator does not put the tokens of a row where they were, from the left, so their weights "
                "cannot follow; leave data_collator out, or padding to the right"
            )
        batch[TOKENS] = _laid_out(weights, batch["labels"])
        return batch


def _weights_of(row: Mapping[str, Any]) -> Tensor:
    tokens = len(row["input_ids"])
    if TOKENS in row:
        weights = torch.as_tensor(row[TOKENS], dtype=torch.float32)
    elif COLUMN in row:
        weights = torch.full((tokens,), float(row[COLUMN]))
    else:
        raise ValueError(f"a row of the batch has neither {TOKENS!r} nor {COLUMN!r}, only {sorted(row)}; pass one on")
    return torch.from_numpy(check_weights(weights, f"the weights of {tokens} tokens")).float()


def _laid_out(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Values of rows as a batch has them: one after the other in a single row, or a row each, zeros to the right."""
    parts = [torch.cat(list(parts))] if len(like) == 1 else parts
    out = torch.zeros(like.shape, dtype=parts[0].dtype)
    if len(parts) != len(out) or max(len(part) for part in parts) > out.shape[1]:
        raise ValueError(
            f"data_collator made {tuple(like.shape)} labels of {len(parts)} rows of up to "
            f"{max(len(part) for part in parts)} tokens; let it keep every row and token, or leave it out"
        )
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


# ---- the weights of tokens


def weigh_tokens(row: Mapping[str, Any], place: int, processing_class: Any, chat_template: str | None) -> dict:
    """`{"token_weights": [...]}`: of a tokenised row the product of its weights, a number a token of `input_ids`.

    Args:
        row: with `input_ids`, and one or more of `weight`, `turn_weights`, `token_weights`; turns need the messages.
        place: of the row, for errors.
        processing_class: what tokenised it.
        chat_template: by which, if not its own.

    Raises:
        ValueError: for weights that are negative, not finite, or of another number than what they weigh.
    """
    tokens, where = len(row["input_ids"]), f"row {place} of the data set"
    if empty := [name for name in NAMES if name in row and row[name] is None]:
        raise ValueError(f"{where} has None in {empty}; give every row its weights, 1 to change nothing")
    weights = torch.ones(tokens, dtype=torch.float64)
    if COLUMN in row:
        weights = weights * _numbers([row[COLUMN]], 1, COLUMN, where)
    if TURNS in row:
        ends = turn_ends(row, processing_class, chat_template, where)
        turns = _numbers(row[TURNS], len(ends), TURNS, where)
        weights = weights * turns.repeat_interleave(torch.tensor([0, *ends]).diff())
    if TOKENS in row:
        weights = weights * _numbers(row[TOKENS], tokens, TOKENS, where)
    return {TOKENS: weights.tolist()}


def turn_ends(
    row: Mapping[str, Any], processing_class: Any, chat_template: str | None = None, where: str = "the row"
) -> list[int]:
    """Of every message of a tokenised conversation, the number of tokens up to its end.

    Raises:
        ValueError: where the text of the first messages is not how the whole conversation begins, as with templates
            that leave out earlier thoughts.
    """
    messages = row.get("messages")
    if messages is None:
        messages = [*(row.get("prompt") or ()), *(row.get("completion") or ())]
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"{where} has {TURNS!r} and no conversation in 'messages' or 'prompt' and 'completion'; pass one, or "
            f"{TOKENS!r}"
        )
    tools = row.get("tools")
    try:
        tools = parsed(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"{where} has 'tools' that are no JSON: {error}; mend the row") from error
    options = {"chat_template": chat_template, "tools": tools, **(row.get("chat_template_kwargs") or {})}
    whole, ends = list(row["input_ids"]), []
    for count in range(1, len(messages) + 1):
        ids = processing_class.apply_chat_template(messages[:count], tokenize=True, return_dict=True, **options)
        ids = list(ids["input_ids"])
        if ids != whole[: len(ids)] or len(ids) < (ends or [0])[-1]:
            raise ValueError(
                f"{where}: by its chat template the first {count} of {len(messages)} messages are not how the whole "
                f"begins, so turns have no tokens of their own; tokenise the rows and pass {TOKENS!r}"
            )
        ends.append(len(ids))
    return [*ends[:-1], len(whole)]


def _numbers(values: Iterable[Any], count: int, name: str, where: str) -> Tensor:
    if not isinstance(values, list | tuple | np.ndarray | Tensor):
        raise TypeError(f"{where} has {values!r} in {name!r}; pass a list of numbers")
    weights = torch.from_numpy(check_weights(list(values), f"{name!r} in {where}"))
    if len(weights) != count:
        what = {TURNS: "messages", TOKENS: "tokens"}[name]
        raise ValueError(f"{where} has {len(weights)} {name!r} for {count} {what}; pass one for each")
    return weights


def _cut(dataset: Any, args: Any, packing: bool, options: Mapping[str, Any]) -> Any:
    """Tokenised rows packed, or cut off at `max_length`, as TRL does it, with their weights."""
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    if packing:
        # other strategies cut rows in parts, and lose none
        _refuse_unlabelled(dataset, args.max_length if args.packing_strategy == "bfd" else None)
        dataset = dataset.select_columns(["input_ids", "labels", TOKENS])
        dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, dict(options))
    elif args.max_length is not None:
        kept = slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)
        dataset = dataset.map(_truncated, fn_kwargs={"kept": kept}, **options).filter(_has_labels, **options)
        _refuse_unlabelled(dataset, args.max_length)
        if rows is not None and (lost := rows - len(dataset)):
            warnings.warn(
                f"{lost} of {rows} rows have no token with a label within max_length={args.max_length}; they are left "
                "out, as SFTTrainer does",
                stacklevel=2,
            )
    else:
        _refuse_unlabelled(dataset, None)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _refuse_unlabelled(dataset: Any, max_length: int | None) -> None:
    """Raise where no row has a token that a loss can be taken of: the first one has none before it."""
    if not isinstance(dataset, Dataset):
        return
    kept, weighed = slice(1, max_length), 0
    for row in dataset.select_columns(["labels", TOKENS]).with_format(None):
        labelled = [w for w, label in zip(row[TOKENS][kept], row["labels"][kept], strict=True) if label != IGNORED]
        if any(labelled):
            return
        weighed += len(labelled)
    within = "" if max_length is None else f" within max_length={max_length}"
    if weighed:
        raise ValueError(f"all tokens with a label{within} have weight 0, so there is nothing to train on")
    raise ValueError(f"no row of train_dataset has a token with a label{within}; raise it, or pass rows with answers")


def _truncated(row: Mapping[str, Any], kept: slice) -> dict[str, list]:
    return {name: row[name][kept] for name in ("input_ids", "labels", TOKENS)}


def _has_labels(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"])
