# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples,trl]",
#     "datasets>=5.1",
#     "peft>=0.21",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
#     "trl>=1.16",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Which rows to fine-tune a small language model on: methods side by side at an equal number of tokens.

SmolLM2-135M-Instruct with LoRA. The pool has rows of four kinds (GSM8K, code, role play, tool use), equally many, none
longer than `--longest` tokens; in the damaged pool a fifth of them are spoilt, a third each: answers swapped between
questions of a kind, cut off in the middle, and rows replaced by copies of others. The model itself scores the
pool, or with `--probes M` that many adapters trained on samples of a clean seed set. Every arm chooses within the same
number of tokens, and trains as many epochs; what counts is the loss of held-out answers, the mean over the kinds.
`clean` leaves out exactly the spoilt rows and draws as the default does.

    python examples/benchmarks/selection_sft.py --model FOLDER          # three seeds: about an hour on one core
    python examples/benchmarks/selection_sft.py --table

Data are looked for in `gsm8k` and `instructions` under HF_EFFDL_DATA. Rows go to `--out` as one JSON line per
(damage, seed, arm); rows that are there are skipped, and so are finished probes and parts of scores in `--work`.
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rows import RowFile, machine, mean_and_error, parser_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_effdl import SFTScorer, train_language_probes
from hf_effdl.samples.drawing.clusters import clusters
from hf_effdl.samples.language.choosing import choose, damaged_rows
from hf_effdl.samples.language.rows import encode


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
KINDS = ("gsm8k", "codegen", "roleplay", "toolformer")
DAMAGES = ("swapped", "cut off", "repeated")
ARMS = ("balanced", "default", "clean", "random", "ifd", "mid-perplexity", "nearest", "length", "top-perplexity")
ARMS += ("el2n", "uncertainty")
# scores by which a damaged row could be told, and whether it has more or less of them
SIGNS = {"match": -1, "ifd": 1, "loss": 1, "p_answer": -1, "el2n": 1, "u_y": 1, "spread": 1, "loss_end": 1}
HELD_OUT, SEEDED, SHARE = 12, 10, 0.4  # rows a kind, rows a kind, share of the pool's tokens
LEAST = 12  # tokens of an answer
TRAINING = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2}
TRAINING |= {"report_to": "none", "use_cpu": True, "bf16": True, "disable_tqdm": True, "save_strategy": "no"}
TRAINING |= {"logging_strategy": "no", "activation_checkpointing": False, "optim": "adamw_torch"}


# ---- data


def read(kind: str) -> Iterator[tuple[str, str]]:
    """Questions and answers of a kind."""
    if kind == "gsm8k":
        for line in (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["question"], row["answer"]
    else:
        for row in json.loads((DATA / "instructions" / f"{kind}.json").read_text(encoding="utf-8")):
            yield f"{row['instruction']}\n{row['input']}".strip(), row["response"]


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def drawn(tokenizer: Any, count: int, longest: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """So many pairs of each kind, that are short enough and have an answer to speak of."""
    found = {}
    for kind in KINDS:
        pairs = list(read(kind))
        random.Random(f"{kind} {seed}").shuffle(pairs)
        kept: list[tuple[str, str]] = []
        for question, answer in pairs:
            if len(question) + len(answer) < 8 * longest and answer.strip() and len(kept) < count:
                row = encode({"messages": talk(question, answer)}, tokenizer, 10**6)
                if len(row) <= longest and len(row.answer) >= LEAST:
                    kept.append((question, answer))
        found[kind] = kept
    return found


def spoil(rows: list[dict], tokenizer: Any, share: float, seed: int) -> None:
    """Damage a share of the rows in place; each says how."""
    chance = random.Random(seed)
    bad = chance.sample(range(len(rows)), round(share * len(rows)))
    swapped, cut, repeated = (bad[i::3] for i in range(3))
    for kind in KINDS:
        mine = [i for i in swapped if rows[i]["kind"] == kind]
        answers = [rows[i]["answer"] for i in mine]
        for i, answer in zip(mine, [*answers[1:], *answers[:1]], strict=True) if len(mine) > 1 else ():
            rows[i] |= {"answer": answer, "damage": "swapped"}
    for i in cut:
        ids = tokenizer(rows[i]["answer"])["input_ids"]
        short = tokenizer.decode(ids[: max(4, int(len(ids) * chance.uniform(0.3, 0.7)))])
        rows[i] |= {"answer": short, "damage": "cut off"}
    whole = [i for i, row in enumerate(rows) if not row["damage"] and i not in repeated]
    for i in repeated:
        rows[i] |= rows[chance.choice(whole)] | {"damage": "repeated"}


def data_of(tokenizer: Any, options: Any, seed: int, damage: float) -> dict[str, Dataset]:
    """Pool, seed set and held-out rows."""
    pairs = drawn(tokenizer, options.rows + HELD_OUT + SEEDED, options.longest, seed)
    parts: dict[str, list[dict]] = {"held_out": [], "seed": [], "pool": []}
    for kind, found in pairs.items():
        for i, (question, answer) in enumerate(found):
            part = "held_out" if i < HELD_OUT else "seed" if i < HELD_OUT + SEEDED else "pool"
            parts[part].append({"question": question, "answer": answer, "kind": kind, "damage": ""})
    random.Random(seed).shuffle(parts["pool"])
    spoil(parts["pool"], tokenizer, damage, seed)
    for rows in parts.values():
        for row in rows:
            row["messages"] = talk(row.pop("question"), row.pop("answer"))
    return {name: Dataset.from_list(rows) for name, rows in parts.items()}


# ---- one pool


class Pool:
    """A pool with its scores, and arms that are trained on parts of it."""

    def __init__(self, options: Any, tokenizer: Any, seed: int, damage: float) -> None:
        self.options, self.tokenizer, self.seed = options, tokenizer, seed
        self.data = data_of(tokenizer, options, seed, damage)
        self.work = options.work / f"{damage:g}-{seed}"
        start = time.process_time()
        probes = self.probes()
        trained = time.process_time()
        settings = {"max_length": options.longest, "batch_tokens": 768, "cache_dir": self.work, "seed": seed}
        self.scorer = SFTScorer(probes, tokenizer, **settings)
        self.scored = self.scorer.score(self.data["pool"])
        self.table = self.scorer.table(self.scored)
        self.seconds = {"probes": trained - start, "scoring": time.process_time() - trained}
        self.groups = clusters(self.table["embedding"], None, seed)
        self.budget = int(SHARE * int(self.table["tokens"].sum()))

    def probes(self) -> Any:
        """Adapters trained on the seed set, or the model itself as the only probe."""
        if not self.options.probes:
            return [self.model()]
        args = TrainingArguments(str(self.options.work / f"probes-{self.seed}"), num_train_epochs=2, **TRAINING)
        made = {"max_length": self.options.longest, "seed": self.seed, "peft_config": self.adapter()}
        made["num_probes"] = self.options.probes
        return train_language_probes(self.model, args, self.data["seed"], self.tokenizer, **made)

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.bfloat16)

    def adapter(self) -> Any:
        from peft import LoraConfig

        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        return LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")

    def told(self) -> dict[str, Any]:
        """How well scores tell damaged rows from others, and what the default leaves out."""
        damage = self.data["pool"]["damage"]
        whole = torch.tensor([not one for one in damage])
        found = {}
        for name in DAMAGES:
            bad = torch.tensor([one == name for one in damage])
            if bad.any():
                found[name] = {
                    score: area(sign * self.table[score][bad], sign * self.table[score][whole])
                    for score, sign in SIGNS.items()
                    if score in self.table
                }
        left = torch.stack(list(damaged_rows(self.table, self.groups).values())).any(0)
        out = {
            name: float(left[[one == name for one in damage]].double().mean())
            for name in (*DAMAGES, "")
            if name in damage
        }
        return {"auc": found, "left_out": out}

    def chosen(self, arm: str) -> Tensor:
        """Positions of the rows that an arm trains on."""
        options = {"unit": "tokens", "groups": self.groups, "seed": self.seed}
        if arm == "clean":
            whole = torch.tensor([not one for one in self.data["pool"]["damage"]]).nonzero().flatten()
            table = {name: values[whole] for name, values in self.table.items()}
            uniform = {name: value for name, value in options.items() if name != "groups"}
            positions = choose(table, self.budget, method="random", **uniform).positions
            return whole[positions]
        query = None
        if arm == "nearest":
            query = self.scorer.table(self.scorer.score(self.data["seed"], progress=False))["embedding"]
        return choose(self.table, self.budget, method=arm, query=query, **options).positions

    def row(self, arm: str) -> dict[str, Any]:
        """Train an arm, and ask it about held-out answers."""
        from trl import SFTConfig

        from hf_effdl import WeightedSFTTrainer

        positions = [] if arm == "base" else self.chosen(arm).tolist()
        model, start = self.model(), time.process_time()
        if positions:
            subset = self.data["pool"].select(positions).select_columns("messages")
            subset = subset.map(halves, remove_columns="messages").add_column("weight", [1.0] * len(subset))
            settings = {"num_train_epochs": self.options.epochs, "seed": self.seed, "max_length": None} | TRAINING
            args = SFTConfig(str(self.work / "run"), **settings)
            options = {"train_dataset": subset, "processing_class": self.tokenizer, "peft_config": self.adapter()}
            trainer = WeightedSFTTrainer(model, args, **options)
            trainer.train()
            model = trainer.model
        trained = time.process_time() - start
        bare = SFTScorer(model.eval(), self.tokenizer, contrast=False, embed=False, batch_tokens=768)
        losses = bare.table(bare.score(self.data["held_out"], progress=False))["loss"]
        kinds = self.data["held_out"]["kind"]
        by_kind = {kind: losses[[one == kind for one in kinds]].mean().item() for kind in KINDS}
        spoilt = [bool(self.data["pool"][i]["damage"]) for i in positions]
        return {
            "loss": sum(by_kind.values()) / len(KINDS),
            "losses": by_kind,
            "rows": len(positions),
            "tokens": int(self.table["tokens"][positions].sum()) if positions else 0,
            "spoilt": sum(spoilt),
            "seconds": trained,
        }


def halves(row: dict) -> dict:
    """A conversation as a prompt and a completion, so that only the answer is trained on."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def area(bad: Tensor, good: Tensor) -> float:
    """Probability that a bad row has more of a score than a good one; ties count half."""
    above = (bad[:, None] > good).double() + 0.5 * (bad[:, None] == good)
    return above.mean().item()


# ---- tables


def print_table(rows: RowFile) -> None:
    for damage in sorted({row["damage"] for row in rows.rows}, reverse=True):
        cells = {(row["arm"], row["seed"]): row for row in rows.rows if row["damage"] == damage}
        seeds = sorted({seed for arm, seed in cells if arm == "balanced"})
        print(f"\n{damage:.0%} of the pool damaged, {len(seeds)} seeds; loss of held-out answers, nats a token\n")
        print("| arm | mean over kinds | ahead of `balanced` | GSM8K | damaged rows chosen |\n|---|---|---|---|---|")
        for arm in ("base", *ARMS):
            mine = [cells[arm, seed] for seed in seeds if (arm, seed) in cells]
            if not mine:
                continue
            loss, gsm8k = (mean_and_error([pick(row) for row in mine])[0] for pick in (total, maths))
            ahead = [cells["balanced", row["seed"]]["loss"] - row["loss"] for row in mine]
            gain = "" if arm == "balanced" else "{:+.4f} ({:.4f})".format(*mean_and_error(ahead))
            few = f" ({len(mine)} seeds)" if len(mine) < len(seeds) else ""
            chosen = sum(row["spoilt"] for row in mine) / max(1, sum(row["rows"] for row in mine))
            print(f"| {arm}{few} | {loss:.4f} | {gain} | {gsm8k:.4f} | {chosen:.0%} |")
        print_scores([cells[key] for key in cells if key[0] == "scores"])


def total(row: dict) -> float:
    return row["loss"]


def maths(row: dict) -> float:
    return row["losses"]["gsm8k"]


def print_scores(rows: list[dict]) -> None:
    kinds = [name for name in DAMAGES if rows and name in rows[0]["auc"]]
    if kinds:
        print("\nProbability that a damaged row is told from a whole one, mean over seeds\n")
        print(f"| score | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
        for score in (score for score in SIGNS if all(score in row["auc"][kind] for row in rows for kind in kinds)):
            means = [mean_and_error([row["auc"][kind][score] for row in rows]) for kind in kinds]
            print(f"| {score} | {' | '.join('{:.2f} ({:.2f})'.format(*one) for one in means)} |")
    for row in rows[:1]:
        names = [*kinds, ""]
        left = [(name or "whole", mean_and_error([row["left_out"][name] for row in rows])[0]) for name in names]
        print("\nThe default leaves out " + ", ".join(f"{share:.0%} of the {name}" for name, share in left) + " rows.")
        spent = {name: mean_and_error([row["seconds"][name] for row in rows])[0] for name in ("probes", "scoring")}
        print(f"CPU seconds: probes {spent['probes']:.0f}, scoring {spent['scoring']:.0f}.")


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "selection_sft")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=Path("runs/selection_sft"))
    parser.add_argument("--rows", type=int, default=40, help="of each kind in the pool")
    parser.add_argument("--longest", type=int, default=128, help="tokens a row")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--probes", type=int, default=0, help="adapters that score; 0: the model itself does")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--damage", type=float, nargs="+", default=[0.2, 0.0])
    parser.add_argument("--arms", nargs="*", default=[*ARMS, "base"], choices=[*ARMS, "base"])
    options = parser.parse_args(argv)
    fixed = {"pool": options.rows, "longest": options.longest, "epochs": options.epochs, "probes": options.probes}
    rows = RowFile(options.out, ("damage", "seed", "arm"), fixed)
    if not options.table:
        torch.set_num_threads(options.threads)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        for damage in options.damage:
            for seed in options.seeds:
                arms = [arm for arm in ("scores", *options.arms) if (damage, seed, arm) not in rows]
                arms = [arm for arm in arms if damage or arm != "clean"]
                arms = [arm for arm in arms if options.probes or arm != "uncertainty"]
                pool = Pool(options, tokenizer, seed, damage) if arms else None
                for arm in arms:
                    found = pool.told() | {"seconds": pool.seconds} if arm == "scores" else pool.row(arm)
                    rows.add({"damage": damage, "seed": seed, "arm": arm} | fixed | found | machine(), hide=("auc",))
    print_table(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
