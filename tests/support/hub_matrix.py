"""Every kind of artefact on a Hub: made, pushed past faults, and loaded; run in processes of their own.

    hub.run("import hub_matrix; hub_matrix.push('structure')", home)    # leaves home/expected.json
    hub.run("import hub_matrix; hub_matrix.load(['slim'], {'slim': revision})", other)

Nothing here imports the package but what makes things: what loads may have to do without it.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch


torch.set_num_threads(1)
_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.01))  # clients wait long between their tries
OWNER = "tester"


def short_of_patience() -> None:
    """What the page of troubles says against a Hub that is silent, with a second for ten."""
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    exec(page.partition("```python\n")[2].partition("```")[0].replace("10.0", "1.0"), {})


def fault(name: str = "", text: str = "") -> None:
    """Let something happen to requests from now on, see `hub.FAULTS`; nothing without a name."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    urlopen(f"{os.environ['HF_ENDPOINT']}/fault/{name}/{text}").read()


def failed(call: Any, *arguments: Any) -> list[str] | None:
    """The kinds and the text of the error that a call ends with."""
    try:
        call(*arguments)
    except Exception as error:
        kinds = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__]
        return [*kinds, str(error)]
    return None


# ---- making: name -> (what pushes it, what it then answers)


def structure() -> dict[str, tuple[Any, Any]]:
    import growing_run
    import ticket_run
    import tiny_run

    options = {"num_train_epochs": 1, "save_strategy": "no", "eval_strategy": "no"}
    run = tiny_run.trainer("run", push_to_hub=True, hub_model_id="tester/checkpoint", **options)
    run.train()
    quick = {"macs": 0.6, "calibration": False, "latency_batch": 0}
    slim, free = run.slim(**quick), run.slim(**quick, widths="free")
    grown = growing_run.trainer("grown", push_to_hub=True, hub_model_id="tester/grown", **options)
    grown.train()
    ticket = ticket_run.search("ticket")
    family = {0.6: slim, 0.4: run.slim(**(quick | {"macs": 0.4}))}
    return {
        "checkpoint": (lambda repo: run.push_to_hub(), logits(run.model)),
        "slim": (lambda repo: run.push_slim(slim, repo), logits(slim)),
        "free": (lambda repo: run.push_slim(free, repo), logits(free)),
        "family": (lambda repo: run.push_family(family, repo), ["macs-0.4", *logits(family[0.4])]),
        "grown": (lambda repo: grown.push_to_hub(), logits(grown.model)),
        "ticket": (ticket.push_to_hub, [ticket.step, *sorted(kept.tolist() for kept in ticket.kept.values())]),
    }


def adapters() -> dict[str, tuple[Any, Any]]:
    import lora_run

    from hf_effdl import select_lora_ranks

    base = lora_run.bert().double().eval()
    base.push_to_hub("tester/base")
    run = lora_run.trainer("run", max_steps=20)
    run.train()
    small = select_lora_ranks(run.model, run.path, 0.4)
    answer = small.eval()(TOKENS).logits.flatten().tolist()
    return {"lora": (lambda repo: run.push_slim(small, repo, finetuned_from="tester/base"), answer)}


def samples() -> dict[str, tuple[Any, Any]]:
    import selection_run
    from datasets import load_dataset

    from hf_effdl import LinearProbes, UncertaintySelector

    selection_run.rows(80, 2).push_to_hub("tester/rows")
    pool = load_dataset("tester/rows", split="train")
    probes = LinearProbes.train(None, selection_run.rows(60, 1), input_column="x", steps=20)
    selector = UncertaintySelector(probes, trial=False)
    scored = selector.score(pool)
    selection = selector.plan(scored, 20)
    return {
        "selection": (selection.push_to_hub, selection.apply(pool)["weight"][:]),
        "scores": (scored.push_to_hub, scored["u_x"][:]),
    }


def prompts() -> dict[str, tuple[Any, Any]]:
    import warnings

    import scenes

    from hf_effdl import (
        CascadeSelector,
        ExamplePool,
        FeatureMatching,
        ListwiseRanker,
        ListwiseRankerConfig,
        VisualInContextModel,
        VisualInContextPipeline,
        measure_examples,
    )
    from hf_effdl.vicl.remote_code import cascade_head

    scenes.scene(99)[0].save("query.png")
    encoder = scenes.tiny_encoder()
    options = {"encoder": encoder, "id_column": "name", "cache_dir": "cache", "progress": False, "foreground": 1}
    pool = ExamplePool.from_dataset(scenes.rows(12), label_column="mask", **options)
    torch.manual_seed(0)
    ranker = ListwiseRanker(ListwiseRankerConfig(hidden_size=16, num_attention_heads=2, list_length=3)).eval()
    plain = VisualInContextPipeline(VisualInContextModel.from_parts(FeatureMatching(encoder)), "dense", pool)
    model = VisualInContextModel.from_parts(FeatureMatching(encoder))
    measure_examples(model, pool, candidates=8, progress=False)
    cascade_head.STEPS = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chooser = CascadeSelector(model, passes=3).fit(pool, progress=False)
    cascade = VisualInContextPipeline(model, chooser, pool)
    return {
        "pool": (pool.push_to_hub, pool.ids),
        "ranker": (ranker.push_to_hub, ranked(ranker)),
        "pipeline": (plain.push_to_hub, chosen(plain, "query.png")),
        "cascade": (cascade.push_to_hub, chosen(cascade, "query.png")),
    }


PILLARS = {"structure": structure, "adapters": adapters, "samples": samples, "prompts": prompts}


# ---- answers


TOKENS = torch.arange(3, 19).view(2, 8)


def logits(model: Any) -> list[float]:
    return model.eval()(torch.linspace(-1, 1, 512).view(2, 1, 16, 16)).logits.flatten().tolist()


def ranked(ranker: Any) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(shape, generator=generator) for shape in ((2, 5, 16), (2, 7, 5, 16))]
    return ranker(*tokens).scores.flatten().tolist()


def chosen(pipe: Any, query: str) -> list[Any]:
    from PIL import Image

    out = pipe(Image.open(query))
    return [out["example_ids"], int(out["prediction"].sum()), *out["scores"]]


# ---- loading: a repository, its revision, and whether the package may be imported


def stock(repo: str, revision: str | None, ours: bool) -> list[float]:
    if ours:
        import hf_effdl  # noqa: F401
    from transformers import AutoModelForImageClassification

    return logits(AutoModelForImageClassification.from_pretrained(repo, revision=revision))


def family(repo: str, revision: str | None, ours: bool) -> list[Any]:
    name = "macs-0.4"  # as a reader of the card knows it
    if ours:
        from hf_effdl import choose

        name = choose(repo, macs=json.loads(os.environ["FAMILY_MACS"]), revision=revision)
    return [name, *stock(repo, os.environ.get("FAMILY_COMMIT", name), ours)]


def ticket(repo: str, revision: str | None, ours: bool) -> list[Any]:
    from hf_effdl import Ticket

    found = Ticket.from_pretrained(repo, revision=revision)
    return [found.step, *sorted(kept.tolist() for kept in found.kept.values())]


def lora(repo: str, revision: str | None, ours: bool) -> list[float]:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained("tester/base", dtype=torch.float64)
    return PeftModel.from_pretrained(base, repo, revision=revision).eval()(TOKENS).logits.flatten().tolist()


def selection(repo: str, revision: str | None, ours: bool) -> list[float]:
    from datasets import load_dataset

    if ours:
        from hf_effdl import load_selection

        return load_selection(repo, revision=revision)["weight"][:]
    return load_dataset(repo, "default", split="train", revision=revision)["weight"][:]


def scores(repo: str, revision: str | None, ours: bool) -> list[float]:
    from datasets import load_dataset

    return load_dataset(repo, split="train", revision=revision)["u_x"][:]


def pool(repo: str, revision: str | None, ours: bool) -> list[str]:
    from datasets import load_dataset

    if ours:
        from hf_effdl import ExamplePool

        return ExamplePool.from_pretrained(repo, revision=revision).ids
    return [row["id"] for row in load_dataset(repo, split="train", revision=revision)["json"]]


def ranker(repo: str, revision: str | None, ours: bool) -> list[float]:
    from transformers import AutoModel

    if ours:
        import hf_effdl.vicl.auto  # noqa: F401
    return ranked(AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=not ours).eval())


def pipeline(repo: str, revision: str | None, ours: bool) -> list[Any]:
    from transformers import pipeline

    if ours:
        from hf_effdl import VisualInContextPipeline

        return chosen(VisualInContextPipeline(repo, revision=revision), os.environ["QUERY"])
    return chosen(pipeline(model=repo, revision=revision, trust_remote_code=True), os.environ["QUERY"])


def metric(repo: str, revision: str | None, ours: bool) -> list[float]:
    import evaluate

    found = evaluate.load(repo, revision=revision).compute(predictions=[[[1, 1, 0]]], references=[[[1, 0, 0]]])
    return list(found.values())


LOADERS = {name: stock for name in ("checkpoint", "slim", "free", "grown")}
LOADERS |= {"family": family, "ticket": ticket, "lora": lora, "selection": selection, "scores": scores, "pool": pool}
LOADERS |= {"ranker": ranker, "pipeline": pipeline, "cascade": pipeline, "foreground_iou": metric}


# ---- what the processes do


LOG: list[str] = []  # what transformers says while a thing is loaded


class Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOG.append(record.getMessage())


def files(folder: str) -> set[str]:
    return {str(file) for file in Path(folder).rglob("*") if file.is_file() and file.stat().st_size}


def push(pillar: str, faults: list[tuple[str, str]]) -> None:
    """Push all of a pillar, each thing past every fault; what it answers and what was said is left in files."""
    made, told = PILLARS[pillar](), {}
    for name, (upload, _) in made.items():
        before = files(".")
        told[name] = []
        for what, where in faults:
            fault(what, where)
            told[name].append(failed(upload, f"{OWNER}/{name}"))
        fault()
        told[name].append(sorted(before - files(".")))
        upload(f"{OWNER}/{name}")
    Path("expected.json").write_text(json.dumps({name: answer for name, (_, answer) in made.items()}))
    Path("told.json").write_text(json.dumps(told))


def load(revisions: dict[str, str | None], ours: bool = True, faults: list[tuple[str, str]] = ()) -> None:
    """Load some things, each past every fault, and print what they answer and what was said."""
    logging.getLogger("transformers").addHandler(Keep())
    if not ours:
        sys.modules["hf_effdl"] = None
    said: dict[str, Any] = {}
    if faults:
        short_of_patience()
    for name, revision in revisions.items():
        loader, told = LOADERS[name], []
        for what, where in faults:
            fault(what, where)
            told.append(failed(loader, f"{OWNER}/{name}", revision, ours))
        if faults:
            fault()
        answers: list[Any] = []
        error = failed(lambda: answers.extend(loader(f"{OWNER}/{name}", revision, ours)))
        said[name] = {"answer": answers, "error": error, "told": told, "logged": [*LOG]}
        LOG.clear()
    print(json.dumps(said))
