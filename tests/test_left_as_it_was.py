"""Calls leave random states, modes, frozen parameters, hooks, weights and inputs as they were, also by an error."""

import random
from functools import partial

import active_run
import chat
import numpy as np
import pytest
import scenes
import sft_score_run
import tiny_run
import torch
from datasets import Dataset
from models import randomise_norms, resnet
from torch import nn

from hf_effdl import (
    ActiveLearner,
    ColumnAnswers,
    LinearProbes,
    ProbeScorer,
    SFTScorer,
    UncertaintySelector,
    VisualInContextPipeline,
    find_groups,
    measure_examples,
    recalibrate_batch_norm,
    score_shards,
    slim,
    widen,
)
from hf_effdl.structure.slim.latency import measure_latency


HOOKS = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks".split()


def breaks(*given):
    raise OSError("the model is ill")


def of_net(call):
    """In train mode but for one part, frozen there, with a hook of the user's own; the last batch may not fit."""

    def make(folder, fails):
        torch.manual_seed(0)
        model, x = randomise_norms(resnet()).train(), torch.randn(40, 3, 32, 32).split(8)
        model.resnet.embedder.eval().requires_grad_(False)
        model.classifier.register_forward_hook(lambda *given: None)
        x = [*x, torch.randn(8, 5, 32, 32)] if fails else [*x]
        return [model], x, lambda: call(model, x)

    return make


def of_trainer(call):
    def make(folder, fails):
        run = tiny_run.trainer(folder, num_train_epochs=1, save_strategy="no", eval_strategy="no")
        run.train()
        model = run.plain_model().train()
        if fails:
            model.resnet.pooler.register_forward_hook(breaks)
        return [model], [], lambda: call(run)

    return make


def of_language(folder, fails):
    models, rows = [chat.llama(seed) for seed in (0, 1)], Dataset.from_dict(chat.conversations(12))
    made = SFTScorer(models, chat.tokenizer(), **sft_score_run.SETTINGS)
    for model in models:  # trained on meanwhile
        model.train()(torch.arange(5)[None], output_hidden_states=True)  # transformers hangs up hooks of its own
    if fails:
        models[1].model.norm.register_forward_hook(breaks)
    return models, rows, lambda: made.score(rows)


def of_probes(call):
    def make(folder, fails):
        net, rows = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), active_run.cloud(60)
        train = partial(LinearProbes.train, net, input_column="features", num_probes=2, steps=2, names=list("abc"))
        probes = train(rows)
        if fails:
            net[2].register_forward_hook(breaks)
        rows = rows.map(lambda row: {"features": row["features"][::-1]})  # that are not known yet
        return [net.train()], rows, lambda: call(train, probes, rows, folder)

    return make


def in_shards(train, probes, rows, folder):
    rows.to_parquet(folder / "rows.parquet")
    score_shards([str(folder / "rows.parquet")], folder / "out", ProbeScorer(probes, "label"))


def in_rounds(train, probes, rows, folder):
    ActiveLearner(rows, lambda data, seed: train(data, seed=seed), ColumnAnswers(), folder, batch=12).run(2)


def of_prompts(call):
    def make(folder, fails):
        vit = scenes.tiny_vit()
        model = scenes.make_model(encoder=scenes.VisionEncoder(vit))
        pool, image = scenes.make_pool(folder, encoder=model.encoder), scenes.scene(50)[0]
        if fails:
            vit.register_forward_hook(breaks)
        return [vit], [image], lambda: call(model, pool, image, folder)

    return make


def found(model, x):
    return find_groups(model, x[0])


CALLS = {
    "find_groups": of_net(lambda model, x: find_groups(model, x[-1])),
    "slim": of_net(lambda model, x: slim(model, found(model, x), 0.5, example_inputs=x[-1])),
    "slim, calibration": of_net(lambda model, x: slim(model, found(model, x), 0.5, calibration=x)),
    "slim, free": of_net(lambda model, x: slim(model, found(model, x), 0.5, calibration=x, widths="free")),
    "widen": of_net(lambda model, x: widen(model, found(model, x)[0], 4 - x[-1].shape[1])),
    "batch norm": of_net(lambda model, x: recalibrate_batch_norm(slim(model, found(model, x), 0.5), x)),
    "latency": of_net(lambda model, x: measure_latency([model, model], x[-1], repeats=2)),
    "trainer.slim": of_trainer(lambda run: run.slim(macs=0.5)),
    "evaluate_path": of_trainer(lambda run: run.evaluate_path()),
    "SFTScorer": of_language,
    "probes": of_probes(lambda train, probes, rows, folder: train(rows)),
    "select": of_probes(lambda train, probes, rows, folder: UncertaintySelector(probes, "label").select(rows, 0.5)),
    "score_shards": of_probes(in_shards),
    "rounds": of_probes(in_rounds),
    "pool": of_prompts(lambda model, pool, image, folder: scenes.make_pool(folder / "a", encoder=model.encoder)),
    "measure": of_prompts(lambda model, pool, *_: measure_examples(model, pool, candidates=3, progress=False)),
    "pipeline": of_prompts(lambda model, pool, image, _: VisualInContextPipeline(model, pool=pool)(image)),
    "auto": of_prompts(lambda model, pool, image, _: VisualInContextPipeline(model, "auto", pool=pool)(image)),
}


def seen(modules, inputs):
    """By name, all that a call could have changed."""
    told = {"random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())}
    told["settings"] = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    told["modes"] = [part.training for model in modules for part in model.modules()]
    told["hooks"] = [len(getattr(part, name)) for model in modules for part in model.modules() for name in HOOKS]
    told["gradients"] = [(p.requires_grad, p.grad) for model in modules for p in model.parameters()]
    told["weights"] = [(str(v.dtype), v.tolist()) for model in modules for v in model.state_dict().values()]
    told["inputs"] = str(inputs[:] if isinstance(inputs, Dataset) else [np.asarray(one).tobytes() for one in inputs])
    return told


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_what_is_not_its_own(name, fails, tmp_path):
    modules, inputs, call = CALLS[name](tmp_path, fails)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = seen(modules, inputs)
    if fails:
        with pytest.raises((ValueError, OSError, RuntimeError)):
            call()
    else:
        call()
    after = seen(modules, inputs)
    assert [key for key, value in before.items() if after[key] != value] == []


def scores_of_texts(train):
    model = chat.llama(attention_dropout=0.5)
    made = SFTScorer([model, chat.llama(1)], chat.tokenizer(), **sft_score_run.SETTINGS)
    model.train(train)
    return str(made.table(made.score(Dataset.from_dict(chat.conversations(6)))))


def features_of_rows(train):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).eval()
    probes = LinearProbes.train(net, active_run.cloud(60), input_column="features", num_probes=2, steps=2)
    net.train(train)
    return probes.encode(active_run.cloud(20, seed=1)).tolist()


def views_of_images(train):
    vit = scenes.tiny_vit()
    vit.embeddings.dropout.p = 0.5
    encoder = scenes.VisionEncoder(vit)
    vit.train(train)
    views = encoder(torch.ones(1, 3, 32, 32))["vector"].tolist()
    assert vit.training == train
    return views


@pytest.mark.parametrize("answer", [scores_of_texts, features_of_rows, views_of_images])
def test_a_model_that_is_trained_on_meanwhile_is_asked_in_eval_mode(answer):
    assert answer(True) == answer(False)
