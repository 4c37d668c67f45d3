"""What language models say of answers, and which rows are chosen by it."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import sft_score_run
import torch
from chat import SIZES, conversations, llama, pairs, tokenizer
from compare import assert_close
from datasets import Dataset
from forked import Script
from sft_score_run import ROWS, scorer
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    TrainingArguments,
    set_seed,
)

from hf_effdl import SFTScorer, train_language_probes, uncertainty
from hf_effdl.files import sealed
from hf_effdl.samples.drawing.clusters import clusters
from hf_effdl.samples.language.choosing import choose, damaged_rows, mismatched_rows, near_copies
from hf_effdl.samples.language.rows import encode
from hf_effdl.samples.scores.token_scores import answer_scores, coarse_log_probs, kept_tokens


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the scores of tokens


@pytest.mark.parametrize("top", [3, 8, 12])
def test_merged_tokens_keep_their_probability(top):
    logits, given = drawn(20, 12) * 3, torch.arange(20) % 12
    kept, place = kept_tokens(logits, given, top)
    merged = coarse_log_probs(logits, kept).exp().double()
    p = logits.softmax(1)
    assert kept.gather(1, place[:, None])[:, 0].equal(given)
    assert_close(merged[:, :-1], p.gather(1, kept), 1e-6)
    assert_close(merged.sum(1), torch.ones(20).double(), 1e-6)
    best = p.argmax(1)
    assert (kept == best[:, None]).any(1).all()


def test_scores_of_answers_are_means_over_their_tokens():
    z, given, answer = drawn(9, 4, 6).log_softmax(2), torch.arange(9) % 6, torch.tensor([0] * 2 + [1] * 3 + [2] * 4)
    end = torch.tensor([1, 3, 8])
    found = answer_scores(z, given, answer, end)
    p = z.exp().mean(1)
    for i in range(3):
        rows = answer == i
        mine, tokens = z[rows], given[rows]
        log_given = mine.gather(2, tokens[:, None, None].expand(-1, 4, 1))[..., 0]
        expected = {
            "loss": -log_given.mean(),
            "perplexity": (-log_given.mean()).exp(),
            "p_answer": p[rows].gather(1, tokens[:, None]).log().mean().exp(),
            "u_y": uncertainty(mine, tokens).square().mean().sqrt(),
            "u_x": uncertainty(mine).square().mean().sqrt(),
            "spread": log_given.mean(0).std(),
            "loss_end": -p[end[i], given[end[i]]].log(),
            "entropy": -(p[rows] * p[rows].log()).sum(1).mean(),
            "el2n": (mine.exp() - torch.eye(6)[tokens][:, None]).norm(dim=2).mean(),
            "hits": (p[rows][:, :-1].argmax(1) == tokens).double().mean(),
        }
        assert_close({name: values[i] for name, values in found.items()}, expected, 1e-9)


# ---- the scores of rows


def losses(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return cross_entropy(logits, torch.tensor(answer), reduction="none").double()


@pytest.mark.parametrize("kind", ["messages", "pairs", "texts"])
@torch.no_grad()
def test_scores_are_those_of_every_row_alone(kind):
    texts = {"text": pairs(12)["completion"]}
    data = Dataset.from_dict({"messages": conversations(12), "pairs": pairs(12), "texts": texts}[kind])
    found = (made := scorer(part_rows=12)).table(made.score(data))
    rows, first = [encode(row, tokenizer(), 64) for row in data], llama(0)
    means = [first.model(torch.tensor([row.prompt])).last_hidden_state[0].mean(0) for row in rows]
    for i, row in enumerate(rows):
        each = torch.stack([losses(llama(seed), row.prompt, row.answer).mean() for seed in (0, 1, 2)])
        alone = losses(first, [2] if kind != "texts" else row.prompt, row.answer).mean()
        near = {j: cosine_similarity(means[i], means[j], 0) for j in range(12)} if kind != "texts" else {}
        near = {j: value for j, value in near.items() if value < 0.98}
        other = rows[max(near, key=near.get)] if near else row
        expected = {
            "tokens": len(row.prompt) + len(row.answer),
            "answer_tokens": len(row.answer),
            "loss": each.mean(),
            "spread": each.std(),
            "loss_alone": alone,
            "ifd": (each[0] - alone).exp(),
            "match": losses(first, other.prompt, row.answer).mean() - each[0],
        }
        for name, value in expected.items():
            assert float(found[name][i]) == pytest.approx(float(value), abs=2e-6), name
        hidden = first.model(torch.tensor([row.prompt + row.answer])).last_hidden_state[0]
        place = torch.arange(1.0, len(hidden) + 1)
        assert_close(found["embedding"][i], (hidden * place[:, None]).sum(0) / place.sum(), 1e-5)
    assert found["match"].any() == (kind != "texts")


def test_all_tokens_of_the_vocabulary_give_the_uncertainty_of_their_logits():
    data = Dataset.from_dict(pairs(3))
    found = (made := scorer(top=SIZES["vocab_size"])).table(made.score(data))
    for i, one in enumerate(data):
        row = encode(one, tokenizer(), 64)
        with torch.no_grad():
            logits = [llama(seed)(torch.tensor([row.prompt + row.answer])).logits[0] for seed in (0, 1, 2)]
        z = torch.stack(logits, 1)[len(row.prompt) - 1 : -1]
        expected = uncertainty(z, torch.tensor(row.answer)).square().mean().sqrt()
        assert float(found["u_y"][i]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"batch_tokens": 4096}])
def test_neither_batches_nor_the_order_of_rows_change_scores(changes):
    whole = (one := scorer(part_rows=20)).table(one.score(ROWS))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    other = (two := scorer(part_rows=20, **changes)).table(two.score(ROWS.select(order.tolist())))
    assert_close(other, {name: values[order] for name, values in whole.items()}, 2e-5)


WIDE = {"vocab_size": SIZES["vocab_size"], "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.5}
OTHERS = {
    "learned places": lambda: GPT2LMHeadModel(GPT2Config(**WIDE, num_attention_heads=2, max_position_embeddings=128)),
    "no places": lambda: BloomForCausalLM(BloomConfig(**WIDE, num_attention_heads=2)),
    "recurrent": lambda: MambaForCausalLM(MambaConfig(**WIDE, state_size=4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_padding_changes_nothing_in_other_architectures(name):
    set_seed(0)
    model, data = OTHERS[name](), ROWS.select(range(6))
    one, several = (SFTScorer([model], tokenizer(), batch_tokens=tokens) for tokens in (1, 4096))
    alone = one.table(one.score(data, progress=False))
    assert alone["loss"].std() > 0.01
    assert_close(several.table(several.score(data, progress=False)), alone, 2e-4)


def test_the_answer_of_a_pair_of_messages_is_that_of_the_conversation():
    data = Dataset.from_dict(conversations(6))
    halves = data.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}).remove_columns(
        "messages"
    )
    found = [(made := scorer()).table(made.score(one)) for one in (data, halves)]
    assert_close(*found, 0)


def test_half_precision_and_no_contrast_and_no_embedding():
    whole = (one := scorer()).table(one.score(ROWS))
    half = SFTScorer([llama(seed).to(torch.bfloat16) for seed in (0, 1, 2)], tokenizer(), **sft_score_run.SETTINGS)
    assert_close(half.table(half.score(ROWS))["loss"], whole["loss"], 2e-2)
    bare = scorer(contrast=False, embed=False)
    found = bare.table(bare.score(ROWS))
    assert set(whole) - set(found) == {"loss_alone", "ifd", "match", "embedding"}
    assert_close(found, {name: whole[name] for name in found}, 0)
    single = scorer(seeds=(0,))
    assert not {"u_x", "u_y", "spread"} & set(single.score(ROWS).column_names)


def test_two_processes_score_what_one_scores(tmp_path):
    Script("sft_score_run.py", tmp_path, processes=2, env={"ACCELERATE_USE_CPU": "true"}).finish()
    alone = (made := scorer()).table(made.score(ROWS))
    for rank in (0, 1):
        assert_close(torch.load(tmp_path / f"scores-{rank}.pt", weights_only=True), alone, 0)


def test_finished_parts_are_kept_and_damaged_ones_made_again(tmp_path, monkeypatch):
    alone = (made := scorer()).table(made.score(ROWS))
    asked = []
    part = SFTScorer._part
    monkeypatch.setattr(SFTScorer, "_part", lambda self, rows: asked.append(len(rows)) or part(self, rows))
    monkeypatch.setattr(SFTScorer, "_asked", failing(SFTScorer._asked, after=2))
    with pytest.raises(RuntimeError, match="power cut"):
        scorer(tmp_path).score(ROWS)
    monkeypatch.setattr(SFTScorer, "_asked", failing.plain)
    asked.clear()
    assert_close(alone, (again := scorer(tmp_path)).table(again.score(ROWS)), 0)
    assert asked == [6, 2]
    asked.clear()
    first, second, *_ = tmp_path.glob("part-*")
    first.write_bytes(b"damaged")
    second.write_bytes(sealed({"loss": torch.ones(2)}))
    assert_close(alone, again.table(again.score(ROWS)), 0)
    assert len(asked) == 2
    begun = scorer(tmp_path)
    begun.tokenizer.bos_token = "w1"  # in front of an answer alone
    for other in (scorer(tmp_path, seeds=(0, 1)), scorer(tmp_path, top=4), scorer(tmp_path, contrast=False), begun):
        asked.clear()
        other.score(ROWS)
        assert len(asked) == 4


def failing(asked, after: int):
    """The pass over a part, which fails after some parts."""
    failing.plain, calls = asked, []

    def cut(self, rows):
        calls.append(rows)
        if len(calls) > after:
            raise RuntimeError("power cut")
        return asked(self, rows)

    return cut


# ---- probes


def test_adapters_are_probes_and_are_kept(tmp_path):
    args = {"max_steps": 3, "learning_rate": 0.05, "report_to": "none", "use_cpu": True, "disable_tqdm": True}

    def trained(**changes):
        settings = TrainingArguments(str(tmp_path), **args | changes)
        with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # peft asks for it by its old name
            return train_language_probes(llama, settings, Dataset.from_dict(pairs(8)), tokenizer(), num_probes=2)

    probes = trained()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("probe-*.safetensors")}
    again = trained()
    assert len(files) == 2 and files == {file: file.stat().st_mtime_ns for file in files}
    assert again.fingerprint == probes.fingerprint
    assert trained(learning_rate=0.1).fingerprint != probes.fingerprint
    base = probes.models[0].get_base_model()
    for name, weight in llama().named_parameters():
        assert torch.equal(weight, base.get_parameter(name.replace("_proj.", "_proj.base_layer.")))
    whole, rows = SFTScorer(probes, part_rows=8), Dataset.from_dict(pairs(8, seed=1))
    table = whole.table(whole.score(rows))
    model = probes.models[0]
    model.set_adapter("probe-1")
    model.requires_grad_(False)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: whole.score_rows(rows), range(8)):
            assert_close(found, table, 0)
    assert model.active_adapter == "probe-1" and not any(p.requires_grad for p in model.parameters())
    each = []
    for model in probes.each():
        with torch.no_grad():
            encoded = [encode(row, tokenizer(), 64) for row in rows]
            each.append(torch.stack([losses(model, row.prompt, row.answer).mean() for row in encoded]))
    assert (each[0] - each[1]).abs().min() > 1e-5
    assert_close(table["loss"], (each[0] + each[1]) / 2, 1e-5)


# ---- choosing


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_mismatched_answers_are_counted_by_those_below_zero(share):
    bad = round(4000 * share)
    match = torch.cat([drawn(bad) * 0.5, 0.2 + drawn(4000 - bad, seed=1).abs()])
    found = mismatched_rows(match, spare=1.0)
    assert int(found.sum()) == pytest.approx(bad, rel=0.1)
    worst = match.sort().values[bad]
    assert (found[:bad] == (match[:bad] <= worst)).double().mean() > 0.95
    assert mismatched_rows(match)[:bad].sum() > found[:bad].sum()
    assert not mismatched_rows(match[bad:]).any()


def planted() -> tuple[dict, torch.Tensor]:
    """Two clusters of 40 rows; rows 0 to 3 mismatched, 4 to 7 cut off, 8 to 11 copies of 12 to 15."""
    centre = torch.eye(32)[torch.arange(80) % 2].double() * 4
    table = {"match": 2 + drawn(80).abs(), "loss_end": drawn(80, seed=1).abs(), "loss": drawn(80, seed=2).abs()}
    table |= {"embedding": centre + 0.5 * drawn(80, 32, seed=3), "tokens": torch.arange(80) % 7 + 3}
    table["match"][:4] = torch.tensor([-0.5, 0.5, 0.1, 0.2])
    table["loss_end"][4:8] = 12.0
    table["embedding"][8:12] = table["embedding"][12:16]
    table["loss"][8:12] = table["loss"][12:16] + 0.1
    return table, torch.arange(80) % 2


def test_damaged_rows_are_found_and_left_out():
    table, groups = planted()
    found = damaged_rows(table, groups)
    assert found["mismatched"].nonzero().flatten().tolist() == [0, 2, 3]  # thrice the one below zero
    assert set(range(4, 8)) <= set(found["cut off"].nonzero().flatten().tolist())
    assert found["repeated"].nonzero().flatten().tolist() == [8, 9, 10, 11]
    good = int((~torch.stack(list(found.values())).any(0)).sum())
    plan = choose(table, good, groups=groups)
    assert set(plan.positions.tolist()).isdisjoint({0, 2, 3, *range(4, 12)})
    assert len(choose(table, 80, groups=groups)) == 80  # where the budget asks for more, the others come too


def test_the_default_is_random_rows_of_those_that_look_whole():
    table, groups = planted()
    groups = (torch.arange(80) >= 60).long()  # of other sizes, so that equal shares would be other rows
    whole = ~torch.stack(list(damaged_rows(table, groups).values())).any(0)
    ids = torch.arange(80)
    alone = {name: values[whole] for name, values in table.items()}
    expected = ids[whole][choose(alone, 30, method="random", row_ids=ids[whole]).positions]
    assert choose(table, 30, groups=groups, row_ids=ids).positions.tolist() == expected.tolist()
    assert choose(table, 30, method="balanced", groups=groups, row_ids=ids).positions.tolist() != expected.tolist()


def test_clusters_are_found_whatever_the_order():
    table, groups = planted()
    for seed in range(3):
        found = clusters(table["embedding"], 2, seed)
        assert (found == groups).all() or (found == 1 - groups).all()
    assert len(clusters(drawn(5, 3), 5).unique()) == 5


def test_near_copies_leave_one_of_each_and_never_cross_groups():
    same = torch.ones(5, 3)
    assert near_copies(same, torch.tensor([3.0, 1, 2, 1, 5]), torch.zeros(5)).tolist() == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert near_copies(same, torch.ones(5), torch.arange(5)).sum() == 0


@pytest.fixture(scope="module")
def scored():
    return scorer().score(ROWS)


METHODS = ["default", "random", "balanced", "length", "mid-perplexity", "top-perplexity", "ifd", "el2n", "uncertainty"]


@pytest.mark.parametrize("method", [*METHODS, "nearest"])
@pytest.mark.parametrize("unit, budget", [("rows", 7), ("tokens", 150)])
def test_every_method_keeps_to_its_budget_and_minds_no_order(scored, method, unit, budget):
    query = ROWS.select([3, 4]) if method == "nearest" else None
    made = scorer(clusters=3)
    subset = made.select(scored, budget, unit, method, query)
    sizes, positions = made.table(scored)["tokens"], made.plan.positions
    if unit == "rows":
        assert len(subset) == 7
    else:
        assert int(sizes[positions].sum()) <= budget < int(sizes[positions].sum()) + 2 * int(sizes.max())
    assert subset["messages"] == [ROWS["messages"][i] for i in positions.tolist()]
    assert set(subset.column_names) == {"messages", "weight", "inclusion_probability"}
    order = list(range(19, -1, -1))
    turned = made.select(scored.select(order), budget, unit, method, query)
    assert sorted(map(str, turned["messages"])) == sorted(map(str, subset["messages"]))


def test_baselines_take_the_rows_that_they_name(scored):
    made = scorer()
    table = made.table(scored)
    for method, best in {
        "length": table["answer_tokens"].double(),
        "top-perplexity": table["perplexity"],
        "el2n": table["el2n"],
        "ifd": table["ifd"].where(table["ifd"] < 1, table["ifd"] - 100),
    }.items():
        made.select(scored, 5, method=method)
        inside = torch.zeros(20, dtype=torch.bool)
        inside[made.plan.positions] = True
        assert best[inside].min() >= best[~inside].max(), method
    made.select(scored, 5, method="nearest", query=ROWS.select([3]))
    assert 3 in made.plan.positions


def test_scores_of_others_are_refused(scored):
    changed = scored.map(lambda row, i: row | ({"messages": ROWS["messages"][0]} if i == 3 else {}), with_indices=True)
    for made, data, message in (
        (scorer(seeds=(0, 1, 3)), scored, "20 of 20 rows have the scores of other probes"),
        (scorer(top=4), scored, "20 of 20"),
        (scorer(), changed, "1 of 20 rows"),
        (scorer(), scored.remove_columns("score_key"), "no 'score_key'"),
    ):
        with pytest.raises(ValueError, match=message):
            made.select(data, 5)
    assert len(scorer().select(scored.select(range(10, 20)), 5)) == 5


def test_cost_counts_tokens_and_probes():
    cost = scorer().cost(ROWS, epochs=2, parameters=1000)
    sizes = [encode(row, tokenizer(), 1024) for row in ROWS]
    tokens, answers = sum(map(len, sizes)), sum(len(row.answer) for row in sizes)
    assert cost["training"] == 6 * 1000 * tokens * 2
    assert cost["scoring"] == 2 * llama().num_parameters() * (4 * tokens + answers)
    assert math.isclose(cost["share"], cost["scoring"] / cost["training"]) and "20 rows" in cost["text"]


# ---- the card


def test_the_card_says_what_was_chosen_and_from_what(scored, tmp_path):
    made = scorer()
    table = made.table(scored)
    plain = made.write_card(tmp_path / "scores", scored, source="org/pool", license="cc0-1.0").read_text()
    assert "Scores of the 20 rows of [org/pool](https://huggingface.co/datasets/org/pool)" in plain
    assert "license: cc0-1.0" in plain and "| chosen rows |" not in plain and made.probes.fingerprint[:16] in plain
    subset = made.select(scored, 7)
    card = made.write_card(tmp_path / "chosen", scored, repo_id="me/some-rows", tags=["maths"]).read_text()
    assert "7 of the 20 rows of a data set that is not named" in card and "- maths" in card
    tokens = int(table["tokens"][made.plan.positions].sum())
    assert f"7 rows, {tokens} tokens" in card and len(subset) == 7
    assert 'load_dataset("me/some-rows"' in card and "| method | `default` |" in card
    ordered = [f"{value:.4g}" for value in sorted(table["loss"].tolist())]
    assert f"| `loss` | {ordered[1]}, {ordered[10]}, {ordered[18]} |" in card  # 0.05, 0.5 and 0.95 times 19
    assert str(tmp_path) not in card and "WeightedSFTTrainer" in card
    assert "Scores of the 9 rows" in made.write_card(tmp_path / "other", scored.select(range(9))).read_text()
    with pytest.raises(ValueError, match="has no column 'tokens'"):
        made.write_card(tmp_path, scored.remove_columns(made.columns))


# ---- bad input


FEW = ROWS.select(range(3))
TALK = {"messages": [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]]}


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        ({"prompt": ["w1"], "completion": [" "]}, {}, "row 0 has an empty answer"),
        ({"messages": [TALK["messages"][0], [{"role": "user", "content": "w1"}]]}, {}, "row 1 ends with 'user'"),
        ({"messages": [[{"role": "user", "content": "w"}, {"role": "assistant", "content": ""}]]}, {}, "empty answer"),
        ({"prompt": ["w1 " * 30], "completion": ["w2"]}, {"max_length": 20}, "prompt of 30 tokens.*max_length=20"),
        ({"question": ["w1"]}, {}, r"row 0 has \['question'\]; give it 'messages'"),
        ({"text": ["w1"], "loss": [1.0]}, {}, "columns .'loss'. already"),
        ({"text": []}, {}, "empty data set"),
        ({"messages": ["hello"]}, {}, "row 0 holds 'hello' where its messages should be"),
        ({"messages": [["hello", "there"]]}, {}, "where its messages should be; pass a list of dicts"),
        ({"messages": [[{"content": "w1"}, {"content": "w2"}]]}, {}, r"a message with \['content'\]"),
        ({"messages": [[{"role": "assistant"}]]}, {}, r"a message with \['role'\]; each needs"),
        ({"prompt": [TALK["messages"][0][:1]], "completion": ["w2"]}, {}, "holds 'w2' where its messages should be"),
        ({"prompt": [3], "completion": ["w2"]}, {}, "row 0 holds a int where its text should be"),
        (TALK | {"chat_template_kwargs": ["x"]}, {}, "chat_template_kwargs of row 0 is a str"),
        ({"text": ["w1 " * 200]}, {}, "row 0 has 201 tokens, and the probes have places for 128; set max_length=128"),
    ],
)
def test_rows_without_an_answer_are_refused_by_name(rows, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        scorer(**changes).score(Dataset.from_dict(rows))


def test_what_a_template_or_a_tokenizer_does_not_take_is_named():
    strict = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="row 0 is refused by the chat template: roles must alternate"):
        SFTScorer([llama()], strict).score(Dataset.from_dict(TALK))
    other = tokenizer()
    other.add_tokens([f"new{i}" for i in range(9)])
    with pytest.raises(ValueError, match="row 0 has the token 38, and the probes know 30"):
        SFTScorer([llama()], other).score(Dataset.from_dict({"text": ["w1 new8"]}))
    for rows, message in (([{"text": "w1 \ud800"}], "row 0 of the data is no Unicode"), ([], "rows is empty")):
        with pytest.raises(ValueError, match=message):
            scorer().score_rows(rows)


@pytest.mark.parametrize(
    "changes, choice, message",
    [
        ({}, {"budget": 0}, "budget=0"),
        ({}, {"budget": 4}, "budget=4"),
        ({}, {"unit": "words"}, "unit='words'"),
        ({}, {"unit": "tokens", "budget": 1.5}, "budget=1.5"),
        ({}, {"method": "best"}, "method='best'"),
        ({}, {"method": "nearest", "query": ["w1"]}, "query is a list"),
        ({"clusters": 9}, {}, "clusters=9 of 3 rows"),
        ({}, {"data": FEW.add_column("weight", [1.0] * 3)}, r"columns \['weight'\] already"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_the_pass(changes, choice, message, monkeypatch):
    made = scorer(**changes)
    monkeypatch.setattr(made, "score", lambda *given, **options: pytest.fail("scored"))
    with pytest.raises((ValueError, TypeError), match=message):
        made.select(**{"data": FEW, "budget": 2} | choice)


@pytest.mark.parametrize(
    "setting", [{"contrast": "no"}, {"embed": 2}, {"clusters": 0}, {"seed": "a"}, {"cache_dir": 3}]
)
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises((ValueError, TypeError), match=next(iter(setting))):
        scorer(**setting)


def test_what_cannot_score_is_refused():
    with pytest.raises(ValueError, match="processing_class=None"):
        SFTScorer([llama()])
    with pytest.raises(ValueError, match="no chat template"):
        SFTScorer([llama()], tokenizer(None)).score(Dataset.from_dict(TALK))
    with pytest.raises(ValueError, match="vocabularies of"):
        SFTScorer([llama(), llama(vocab_size=7)], tokenizer())
    broken = llama()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="probe 1 gives NaN"):
        SFTScorer([llama(), broken], tokenizer()).score(FEW)
    with pytest.raises(ValueError, match="budget=2 tokens"):
        scorer().select(FEW, 2, "tokens")
    with pytest.raises(ValueError, match="needs query="):
        scorer().select(FEW, 2, method="nearest")
    with pytest.raises(ValueError, match="method='best'"):
        scorer().select(FEW, 2, method="best")
    for method, bare in (
        ("ifd", {"contrast": False}),
        ("nearest", {"embed": False}),
        ("uncertainty", {"seeds": (0,)}),
    ):
        made = scorer(**bare)
        with pytest.raises(ValueError, match=f"method='{method}' needs the columns"):
            made.select(FEW, 2, method=method, query=FEW)
    with pytest.raises(ValueError, match="score with embed=True"):
        scorer(embed=False).select(FEW, 2)
    with pytest.raises(ValueError, match="num_probes=1"):
        train_language_probes(llama, None, FEW, tokenizer(), num_probes=1)
    for call, message in (("m", "pass a function that makes"), (llama(), "a LlamaForCausalLM"), (llama, "args=None")):
        with pytest.raises(TypeError, match=message):
            train_language_probes(call, None, FEW, tokenizer())


def test_the_end_of_a_row_that_is_cut_off_is_unknown_and_no_sign_of_damage(capsys):
    data = Dataset.from_dict({"text": [" ".join(["w1"] * length) for length in (3, 5, 12, 20)]})
    made = scorer(max_length=8, part_rows=2)
    found = made.table(made.score(data))["loss_end"]
    assert found.isnan().tolist() == [False, False, True, True]
    assert "2 of 4 rows are cut off at max_length=8" in capsys.readouterr().out
    ends = torch.tensor([1.0, 1.1, 0.9, 1.0, torch.nan, torch.nan, torch.nan, torch.nan, 9.0])
    assert damaged_rows({"loss_end": ends}, torch.zeros(9))["cut off"].nonzero().flatten().tolist() == [8]
