"""Probes that are language models: several models, or one with an adapter each."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_effdl.checks import instance, whole_number
from hf_effdl.files import digest, read_sealed, sealed, write_whole
from hf_effdl.processes import agreed, forget_accelerate, is_first, refuse_lone_processes, together
from hf_effdl.random_state import evaluating, random_state_kept
from hf_effdl.row_losses import IGNORED
from hf_effdl.samples.language.rows import Batch, Encoded, encode
from hf_effdl.samples.probes.probes import bootstrap_counts, weights_hash
from hf_effdl.samples.probes.trained_probes import check_training


ASKING = RLock()  # of all probes, since they may share models; a lock of their own is not copied


class LanguageProbes:
    """Several causal language models of one tokenizer, as one.

    Args:
        models: a list of models, such as checkpoints of a run; or one PEFT model whose adapters are the probes.
        processing_class: their tokenizer.

    Raises:
        ValueError: for no model, or models of different vocabularies.
        TypeError: for a tokenizer that is none.
    """

    def __init__(self, models: nn.Module | Sequence[nn.Module], processing_class: Any) -> None:
        instance("models", models, (nn.Module, list, tuple), "a PEFT model with adapters, or a list of models")
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        for model in self.models:
            instance("a model of models", model, nn.Module, "language models")
            if not hasattr(getattr(model, "config", None), "get_text_config"):
                raise TypeError(f"models hold a {type(model).__name__}: pass causal language models of transformers")
        if not self.models:
            raise ValueError("models=[]: pass a PEFT model with adapters, or one model or more")
        if not callable(processing_class) or not hasattr(processing_class, "apply_chat_template"):
            raise TypeError(f"processing_class is a {type(processing_class).__name__}; pass the models' tokenizer")
        single = self.models[0] if len(self.models) == 1 else None
        self.adapters = sorted(getattr(single, "peft_config", None) or ())
        configs = [model.config.get_text_config() for model in self.models]
        sizes = {config.vocab_size for config in configs}
        if len(sizes) > 1:
            raise ValueError(f"the models have vocabularies of {sorted(sizes)} tokens; pass models of one tokenizer")
        self.vocabulary = sizes.pop()
        places = [getattr(config, "max_position_embeddings", None) for config in configs]
        self.longest = min((place for place in places if place), default=None)
        self.processing_class = processing_class

    def __len__(self) -> int:
        return max(len(self.models), len(self.adapters))

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    @property
    def parameters(self) -> int:
        """Of one probe."""
        return sum(p.numel() for p in self.models[0].parameters())

    @property
    def fingerprint(self) -> str:
        """A hash of all weights, made anew each time, and of the tokenizer."""
        tokenizer = [
            json.dumps(sorted(self.processing_class.get_vocab().items())),
            self.processing_class.chat_template,
            *(getattr(self.processing_class, f"{name}_token_id", None) for name in ("bos", "eos")),
        ]
        return digest(json.dumps([weights_hash(self.models), self.adapters, *tokenizer]))

    def to(self, device: torch.device) -> None:
        for model in self.models:
            model.to(device)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads from asking meanwhile; then adapters, and what is trained of them, are as they were."""
        with ASKING:
            model = self.models[0] if len(self.adapters) > 1 else None
            active, trained = getattr(model, "active_adapter", None), {}
            if model is not None:
                trained = {p: p.requires_grad for p in model.parameters()}
            try:
                yield
            finally:
                if model is not None:
                    model.set_adapter(active)
                for p, wanted in trained.items():
                    p.requires_grad_(wanted)

    def each(self) -> Iterator[nn.Module]:
        """The probes one after the other, ready to be asked; of adapters, each is switched on in turn."""
        if len(self.adapters) < 2:
            yield from self.models
            return
        model = self.models[0]
        active = model.active_adapter
        try:
            for name in self.adapters:
                model.set_adapter(name)
                yield model
        finally:
            model.set_adapter(active)

    @contextmanager
    def first(self) -> Iterator[nn.Module]:
        """The first probe."""
        with self.alone(), closing(self.each()) as each:
            yield next(each)

    def check(self, row: Encoded, where: str) -> Encoded:
        """The row itself; raises a `ValueError` where the models do not take it."""
        if self.longest is not None and len(row) > self.longest:
            raise ValueError(
                f"{where} has {len(row)} tokens, and the probes have places for {self.longest}; set "
                f"max_length={self.longest}"
            )
        if (largest := max(row.prompt + row.answer)) >= self.vocabulary:
            raise ValueError(
                f"{where} has the token {largest}, and the probes know {self.vocabulary}; pass the tokenizer that "
                "they were trained with"
            )
        return row


@torch.no_grad()
def ask(model: nn.Module, batch: Batch, embed: bool = False) -> tuple[Tensor, Tensor | None]:
    """Logits of the answers' tokens, `(T, V)`, and if asked for the last hidden states, `(rows, length, d)`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    takes = inspect.signature(base.forward).parameters
    options = {"logits_to_keep": batch.tail} if "logits_to_keep" in takes else {}
    inputs = {name: value for name, value in inputs.items() if name in takes}
    with evaluating(model):  # whatever the mode of a training that it is part of
        out = model(**inputs, **options, use_cache=False, output_hidden_states=embed)
    logits = out.logits[:, -batch.tail :]
    return logits[batch.row.to(device), batch.column.to(device)], out.hidden_states[-1] if embed else None


# ---- training


def train_language_probes(
    model_init: Callable[[], nn.Module],
    args: TrainingArguments,
    rows: Dataset,
    processing_class: Any,
    *,
    peft_config: Any = None,
    num_probes: int = 4,
    max_length: int = 1024,
    seed: int = 0,
) -> LanguageProbes:
    """Train M adapters on one small model, each on its own bootstrap sample of some rows of instruction data.

    A finished adapter is kept as `args.output_dir/probe-m.safetensors`, and not trained again by a run with the same
    rows, model, adapter and arguments.

    Args:
        model_init: makes the model that all adapters share.
        args: `TrainingArguments` of every probe.
        rows: the seed set, best of a few hundred rows that are known to be good; see `SFTScorer` for the columns.
        processing_class: the model's tokenizer.
        peft_config: of the adapters; default: LoRA of rank 8 on all linear layers but the head.
        num_probes: M, 2 or more.
        max_length: rows are cut off after so many tokens.
        seed: of the samples and of training.

    Raises:
        ValueError: for fewer than two probes, no rows, or rows that are no instruction data.
        TypeError: for what is no function, no arguments, or no rows.

    Example:
        >>> probes = train_language_probes(load, args, seed_rows, tokenizer, num_probes=4)  # doctest: +SKIP
    """
    from peft import LoraConfig, get_peft_model

    count = whole_number("num_probes", num_probes, 2)
    check_training(model_init, args)
    instance("rows", rows, (Dataset, list, tuple), "a data set of instruction rows")
    if not len(rows):
        raise ValueError("rows is empty; pass some hundred rows that are known to be good")
    encoded = [encode(row, processing_class, max_length, f"row {i}") for i, row in enumerate(rows)]
    config = peft_config or LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    counts = bootstrap_counts(len(encoded), count, seed)
    with random_state_kept():
        set_seed(seed)
        model = get_peft_model(model_init(), config, adapter_name="probe-0")
        base = weights_hash([model.get_base_model()])
        for m in range(count):
            if m:
                set_seed(seed + m)
                model.add_adapter(f"probe-{m}", config)
        for m in range(count):
            sample = [one for one, times in zip(encoded, counts[m].tolist(), strict=True) for _ in range(times)]
            key = digest(json.dumps([base, repr(config), _plain(args), [[*vars(one).values()] for one in sample]]))
            _train(model, f"probe-{m}", args, sample, processing_class, seed + m, key)
        model.set_adapter("probe-0")
        forget_accelerate(model)
    return LanguageProbes(model, processing_class)


def _plain(args: TrainingArguments) -> dict[str, Any]:
    """What of the arguments decides the weights."""
    aside = ("output_dir", "logging", "report", "run_name", "push", "hub", "save", "disable_tqdm", "eval")
    plain = {
        name: repr(value) for name, value in args.to_dict().items() if not name.startswith((*aside, "local_rank"))
    }
    return plain | {"processes": args.world_size}


def _train(
    model: nn.Module, name: str, args: TrainingArguments, rows: list[Encoded], tokenizer: Any, seed: int, key: str
) -> None:
    """Train one adapter in place, or load it where it was trained before."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = Path(args.output_dir) / f"{name}.safetensors"
    if (kept := agreed(_kept(file, key) if is_first() else None)) is None:
        model.set_adapter(name)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        settings = {"output_dir": f"{args.output_dir}/{name}", "seed": seed, "save_strategy": "no"}
        settings |= {"remove_unused_columns": False}
        trainer = Trainer(model, _changed(args, settings), data_collator=_Collate(pad), train_dataset=rows)
        refuse_lone_processes()
        trainer.train()
        kept = get_peft_model_state_dict(model, adapter_name=name)
        kept = {key: value.detach().cpu().clone() for key, value in kept.items()}
        if is_first():
            write_whole(file, sealed(kept, {"key": key}))
        together()
    set_peft_model_state_dict(model, kept, adapter_name=name)


def _kept(file: Path, key: str) -> dict[str, Tensor] | None:
    if not file.is_file():
        return None
    try:
        tensors, notes = read_sealed(file)
    except ValueError:
        return None
    return tensors if notes and notes.get("key") == key else None


def _changed(args: TrainingArguments, settings: dict[str, Any]) -> TrainingArguments:
    args = copy(args)
    for name, value in settings.items():
        setattr(args, name, value)
    return args


class _Collate:
    """Rows as a batch to train on, padded on the right; prompts have no labels."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: list[Encoded]) -> dict[str, Tensor]:
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.padding)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            start, end = len(row.prompt), len(row)
            ids[i, :end] = torch.tensor(row.prompt + row.answer)
            labels[i, start:end] = torch.tensor(row.answer)
            mask[i, :end] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
