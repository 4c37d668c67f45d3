# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples,trl]",
#     "accelerate>=1.15",
#     "datasets>=5.1",
#     "peft>=0.21",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
#     "trl>=1.16",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Choose the rows of an instruction data set worth fine-tuning on, by a small model, then fine-tune another on them.

    python examples/select_then_sft.py --dataset_name trl-lib/Capybara --proxy HuggingFaceTB/SmolLM2-135M-Instruct \\
        --model_name_or_path HuggingFaceTB/SmolLM2-1.7B-Instruct --budget 500000 --output_dir runs/sft
    accelerate launch examples/select_then_sft.py --config sft.yaml

Rows are conversations (`messages`), pairs (`prompt`, `completion`) or texts (`text`). The first `--seed_rows` of the
shuffled training rows train the probes, adapters on the proxy; look through them first, they should be good. The rest
is the pool. `--compare` also trains on as many tokens drawn without looking. All fields of TRL's `SFTConfig` are
arguments too. Several processes on a machine without a GPU need `--use_cpu`.
"""

import sys
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_effdl import SFTScorer, WeightedSFTTrainer, train_language_probes
from hf_effdl.cli.arguments import Options, leave, parse_arguments
from hf_effdl.cli.work.data import load_any


@dataclass(kw_only=True)
class ScriptArguments(Options):
    """What is chosen from what, by what, for what."""

    model_name_or_path: str = field(metadata={"help": "Model to fine-tune: id on the Hub, or a folder."})
    dataset_name: str = field(metadata={"help": "Data set id on the Hub, a folder, or one from save_to_disk."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to choose from."})
    eval_rows: int = field(default=200, metadata={"help": "Rows set aside to evaluate on."})
    proxy: str | None = field(default=None, metadata={"help": "Small model that scores; default: the model itself."})
    seed_rows: int = field(default=300, metadata={"help": "Rows that train the probes."})
    num_probes: int = field(default=4, metadata={"help": "Number of probes."})
    probe_steps: int = field(default=50, metadata={"help": "Steps of training for each."})
    budget: int = field(default=100_000, metadata={"help": "Tokens to choose."})
    method: str = field(default="default", metadata={"help": "How rows are chosen, e.g. random, balanced, ifd."})
    lora_rank: int = field(default=16, metadata={"help": "Of the adapter that is trained; 0: all weights."})
    compare: bool = field(default=False, metadata={"help": "Also train on as many random tokens."})


def load(name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")


def train(
    script: ScriptArguments, args: SFTConfig, tokenizer: Any, rows: Dataset, test: Dataset, folder: str
) -> float:
    """Loss on the rows set aside."""
    args = copy(args)
    args.output_dir = f"{args.output_dir}/{folder}"
    config = LoraConfig(r=script.lora_rank, target_modules="all-linear") if script.lora_rank else None
    model = load(script.model_name_or_path)
    trainer = WeightedSFTTrainer(model, args, None, rows, test, tokenizer, peft_config=config)
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()["eval_loss"]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    script, args = parse_arguments(argv, ScriptArguments, SFTConfig, description=__doc__)
    data = load_any(script.dataset_name, script.dataset_config)
    data = data[script.train_split].shuffle(seed=args.seed)
    if len(data) <= script.eval_rows + script.seed_rows:
        raise ValueError(f"{len(data)} rows: fewer than --eval_rows and --seed_rows leave a pool of; set them lower")
    test = data.select(range(script.eval_rows))
    seeds = data.select(range(script.eval_rows, script.eval_rows + script.seed_rows))
    pool = data.select(range(script.eval_rows + script.seed_rows, len(data)))
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)

    proxy = script.proxy or script.model_name_or_path
    probe_tokenizer, probe_args = AutoTokenizer.from_pretrained(proxy), copy(args)
    probe_args.output_dir, probe_args.max_steps = f"{args.output_dir}/probes", script.probe_steps
    options = {"num_probes": script.num_probes, "max_length": args.max_length or 1024, "seed": args.seed}
    probes = train_language_probes(lambda: load(proxy), probe_args, seeds, probe_tokenizer, **options)
    scorer = SFTScorer(
        probes, max_length=args.max_length or 1024, cache_dir=f"{args.output_dir}/scores", seed=args.seed
    )
    scored = scorer.score(pool)
    chosen = {"chosen": scorer.select(scored, script.budget, "tokens", script.method)}
    if script.compare:
        chosen["random"] = scorer.select(scored, script.budget, "tokens", "random")
    losses = {name: train(script, args, tokenizer, rows, test, name) for name, rows in chosen.items()}
    if PartialState().is_main_process:
        for name, loss in losses.items():
            print(f"{name}: {len(chosen[name])} of {len(pool)} rows, held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
    leave()
