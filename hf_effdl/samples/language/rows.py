"""Instruction data as tokens: which are the prompt's, and which the answer's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import normalize

from hf_effdl.checks import instance


ALIKE = 0.98  # prompts nearer than this (cosine) are taken for the same question


@dataclass(frozen=True)
class Encoded:
    """A row as tokens: `prompt` before `answer`; of a text, which has no prompt, the first token is in its place."""

    prompt: list[int]
    answer: list[int]
    asked: bool = True

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(row: Mapping[str, Any], tokenizer: Any, max_length: int, where: str = "the row") -> Encoded:
    """The tokens of a row of instruction data.

    =======================  ===========================================  ==================================
    columns                  prompt                                       answer
    =======================  ===========================================  ==================================
    `messages`               all but the last message, by the chat        the last message, an assistant's
                             template
    `prompt`, `completion`   a text, or messages                          a text and the end token, or messages
    `text`                   none; the beginning-of-text token, if any    the whole text and the end token
    =======================  ===========================================  ==================================

    The first line of the table that fits counts. Where the prompt alone is tokenised otherwise than in front of its
    answer, the answer begins where they differ, as in TRL.

    Args:
        row: with the columns of one line.
        tokenizer: of the model; conversations need its chat template.
        max_length: the row is cut off after so many tokens.
        where: names the row in errors.

    Raises:
        ValueError: for other columns, no chat template or one that refuses the row, an empty answer, or one that lies
            beyond `max_length`.
        TypeError: where texts are no texts, or messages no messages.
    """
    whole, prompt = _tokens(row, tokenizer, where)
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    if start == len(whole):
        raise ValueError(f"{where} has an empty answer; leave such rows out")
    if start >= max_length:
        raise ValueError(
            f"{where} has a prompt of {start} tokens, and its answer lies beyond max_length={max_length}; raise it, "
            "or leave such rows out"
        )
    start = max(start, 1) if len(whole) > 1 else start  # nothing says how likely a first token is
    if start == 0:
        raise ValueError(f"{where} is a single token, which nothing comes before; leave such rows out")
    return Encoded(whole[:start], whole[start:max_length], asked="text" not in row or "prompt" in row)


def _tokens(row: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """The whole row, and its prompt alone."""
    instance(where, row, Mapping, "rows as dicts, with messages, prompt and completion, or text")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], where)
        if not messages or messages[-1]["role"] != "assistant":
            last = messages[-1]["role"] if messages else "nothing"
            raise ValueError(f"{where} ends with {last!r}; the last of its messages must be the assistant's answer")
        return _conversation(row, messages[:-1], messages[-1:], tokenizer, where)
    if row.get("prompt") is not None and row.get("completion") is not None:
        if isinstance(row["prompt"], list | tuple):
            asked, answered = (_messages(row[name], where) for name in ("prompt", "completion"))
            return _conversation(row, asked, answered, tokenizer, where)
        _text(row["prompt"], where)
        text = row["prompt"] + _ended(_text(row["completion"], where, answer=True), tokenizer)
        return list(tokenizer(text)["input_ids"]), list(tokenizer(row["prompt"])["input_ids"])
    if row.get("text") is not None:
        ids = list(tokenizer(_ended(_text(row["text"], where, answer=True), tokenizer))["input_ids"])
        first = tokenizer.bos_token_id
        return (ids if first is None or ids[0] == first else [first, *ids]), ([] if first is None else [first])
    raise ValueError(f"{where} has {sorted(row)}; give it 'messages', 'prompt' and 'completion', or 'text'")


def _conversation(
    row: Mapping[str, Any], asked: Sequence[Any], answered: Sequence[Any], tokenizer: Any, where: str
) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} is a conversation, and {type(tokenizer).__name__} has no chat template; set "
            "processing_class.chat_template, or give rows 'prompt' and 'completion' as texts"
        )
    if not any(str(message["content"] or "").strip() for message in answered):
        raise ValueError(f"{where} has an empty answer; leave such rows out")
    given = instance(f"chat_template_kwargs of {where}", row.get("chat_template_kwargs") or {}, Mapping, "a dict")
    options = {"tokenize": True, "return_dict": True, **given}
    try:
        whole = tokenizer.apply_chat_template([*asked, *answered], **options)["input_ids"]
        prompt = tokenizer.apply_chat_template(list(asked), add_generation_prompt=True, **options)["input_ids"]
    except TemplateError as error:
        raise ValueError(f"{where} is refused by the chat template: {error}; mend the row, or leave it out") from error
    return list(whole), list(prompt)


def _messages(value: Any, where: str) -> Sequence[Mapping[str, Any]]:
    """Messages with a role and a content; raises for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise TypeError(f"{where} holds {str(value)[:60]!r} where its messages should be; pass a list of dicts")
    for message in value:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where} has a message with {sorted(message)}; each needs a 'role' and a 'content'")
        if isinstance(message["content"], str):
            _text(message["content"], where)
    return value


def _text(value: Any, where: str, answer: bool = False) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where} holds a {type(value).__name__} where its text should be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is no Unicode text ({error}); leave such rows out") from None
    if answer and not value.strip():
        raise ValueError(f"{where} has an empty answer; leave such rows out")
    return value


def _ended(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the left so that all answers end where the batch does.

    Attributes:
        inputs: `input_ids`, `attention_mask`, `position_ids`, `(rows, length)`.
        tail: tokens from the end that hold all answers, and the one before each.
        given: `(T,)` the answers' tokens, row after row.
        row: `(T,)` of which row each is.
        end: `(rows,)` which of the T tokens ends each answer: the last end-of-text token, or else the last.
        column: `(T,)` where in the last `tail` positions what a model says of it stands.
    """

    inputs: dict[str, Tensor]
    tail: int
    given: Tensor
    row: Tensor
    end: Tensor
    column: Tensor


def batch_of(rows: Sequence[Encoded], padding: int, end: int | None = None) -> Batch:
    """Some rows as a batch; `end` is the end-of-text token."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros_like(ids)
    for row, (line, there) in zip(rows, zip(ids, mask, strict=True), strict=True):
        line[length - len(row) :] = torch.tensor(row.prompt + row.answer)
        there[length - len(row) :] = 1
    tail = 1 + max(len(row.answer) for row in rows)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return Batch(
        inputs,
        tail,
        torch.tensor([token for row in rows for token in row.answer]),
        torch.tensor([i for i, row in enumerate(rows) for _ in row.answer]),
        torch.tensor([len(row.answer) for row in rows]).cumsum(0)
        - torch.tensor([_from_end(row.answer, end) for row in rows]),
        torch.cat([torch.arange(tail - 1 - len(row.answer), tail - 1) for row in rows]),
    )


def _from_end(answer: Sequence[int], end: int | None) -> int:
    """How far from its end, at least 1, an answer has its last end token; 1 where it has none, as if cut off."""
    return 1 + answer[::-1].index(end) if end in answer else 1


def batches_of(rows: Sequence[Encoded], tokens: int) -> list[list[int]]:
    """Rows by length in batches of so many tokens, padding counted; at least one row each."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(rows[i]) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def other_prompts(rows: Sequence[Encoded], prompts: Tensor, max_length: int) -> list[Encoded]:
    """Every row's answer after the prompt of the row whose prompt is nearest to its own and yet another one.

    A row keeps its own where there is no other. A prompt is cut on the left where the whole would be too long.
    """
    unit = normalize(prompts, dim=1)
    near = unit @ unit.T
    near[near >= ALIKE] = -2.0
    found = []
    for i, row in enumerate(rows):
        other = int(near[i].argmax())
        alike = near[i, other] == -2 or rows[other].prompt == row.prompt
        prompt = row.prompt if alike or not (row.asked and rows[other].asked) else rows[other].prompt
        found.append(Encoded(prompt[-max(1, max_length - len(row.answer)) :], row.answer))
    return found
