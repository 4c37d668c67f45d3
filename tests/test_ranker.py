"""The list-wise ranker and its strategy: what must matter to a score and what must not, many lists as one ranking."""

import json
import subprocess
import sys

import pytest
import torch
from scenes import SIZE, make_model, make_pool, tiny_encoder
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from hf_effdl import VisualInContextPipeline
from hf_effdl.vicl.auto import ListwiseRanker, ListwiseRankerConfig
from hf_effdl.vicl.remote_code import modeling_listwise_ranker, ranker_selector
from hf_effdl.vicl.remote_code.modeling_listwise_ranker import label_tokens
from hf_effdl.vicl.remote_code.ranker_losses import neural_ndcg_loss, pairwise_margin_loss, ranks
from hf_effdl.vicl.remote_code.ranker_selector import RankerSelector, pool_label_tokens


D = 16


def make_ranker(seed: int = 0, **changes: object) -> ListwiseRanker:
    torch.manual_seed(seed)
    ranker = ListwiseRanker(ListwiseRankerConfig(**{"hidden_size": D, "num_attention_heads": 4, **changes})).eval()
    with torch.no_grad():  # biases and norms as after training, and roles that are easy to see
        for name, value in ranker.named_parameters():
            value.add_(torch.randn_like(value) * (0.5 if name == "role" else 0.1))
    return ranker.double()


def some(b: int, k: int, t: int = 5, d: int = D, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, candidates = (torch.randn(*shape, t, d, generator=generator).double() for shape in ((b,), (b, k)))
    return query, candidates, torch.rand(b, k, t, 3, generator=generator).double()


KINDS = {"legacy": {"legacy": True}, "default": {}, "own head": {"head": "own"}}


@pytest.fixture(params=KINDS)
def ranker(request) -> ListwiseRanker:
    return make_ranker(**KINDS[request.param])


def labels_for(ranker: ListwiseRanker, labels: Tensor) -> Tensor | None:
    return None if ranker.label is None else labels


# ---- the network


def test_the_released_network_has_as_many_parameters():
    def count(**changes: object) -> int:
        with torch.device("meta"):
            ranker = ListwiseRanker(ListwiseRankerConfig(**changes))
        return sum(value.numel() for value in ranker.parameters())

    assert count(legacy=True) == 10_738_433
    assert count(legacy=True, head="own", role=True, label_channels=3) == 10_738_433  # whatever else is asked for
    block = 3_546_624
    assert count(role=False, bind=False, label_channels=None) == 10_738_433
    assert count(role=False, bind=False, label_channels=None, head="own") == 10_738_433 + 2 * block
    assert count() == 10_738_433 + 2 * 768 + (768 + 1) * 768 + 4 * 768
    assert count(input_size=64) == count() + 65 * 768


def twin(block: nn.Module) -> nn.TransformerEncoderLayer:
    """torch's own layer with a block's weights."""
    made = nn.TransformerEncoderLayer(D, 4, D, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double().eval()
    pairs = {
        "self_attn.in_proj_weight": torch.cat([block.query.weight, block.key_value.weight]),
        "self_attn.in_proj_bias": torch.cat([block.query.bias, block.key_value.bias]),
    }
    for name, part in (
        ("self_attn.out_proj", block.out),
        ("linear1", block.up),
        ("linear2", block.down),
        ("norm1", block.norm1),
        ("norm2", block.norm2),
    ):
        pairs |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    made.load_state_dict(pairs)
    return made


@torch.no_grad()
def test_it_is_the_network_of_the_paper_layer_by_layer():
    ranker = make_ranker(legacy=True)
    query, candidates, _ = some(3, 4)
    blocks = [twin(block) for block in ranker.trunk]
    images = torch.cat([query[:, None], candidates], 1)
    states = torch.cat([images[:, :, 0], images[:, 0, 1:], images[:, 1:, 1:].flatten(1, 2)], 1)
    assert states.shape == (3, 5 * (4 + 1), D)
    for block in blocks:
        states = block(states)
    states = states[:, :5]
    for block in blocks:
        states = block(states)
    net = ranker.predictor
    expected = net[2](net[0](states[:, 1:]).clamp(min=0))[:, :, 0]
    torch.testing.assert_close(ranker(query, candidates).scores, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("head", "passes"), [("none", 0), ("own", 2), ("tied", 3)])
@pytest.mark.parametrize("k", [5, 10])
def test_all_tokens_pass_the_trunk_and_the_first_ones_the_head(head, passes, k):
    ranker, seen = make_ranker(head=head), []
    for block in [*ranker.trunk, *ranker.head]:
        block.register_forward_hook(lambda module, given, output: seen.append(given[0].shape[1]))
    ranker(*some(2, k)[:2])
    assert seen == [5 * (k + 1)] * 3 + [k + 1] * passes


def test_weights_start_as_the_config_says():
    torch.manual_seed(0)
    ranker = ListwiseRanker(ListwiseRankerConfig(hidden_size=64))
    assert 0.01 < ranker.role.std() < 0.03 and not torch.equal(ranker.role[0], ranker.role[1])
    for block in ranker.trunk:
        assert (block.norm1.weight == 1).all() and (block.up.bias == 0).all() and block.norm2.eps == 1e-6
        bound = (6 / 128) ** 0.5  # Xavier's
        assert 0.95 * bound < block.up.weight.abs().max() <= bound


# ---- what may not matter, and what must


@torch.no_grad()
def test_the_order_of_the_candidates_orders_the_scores(ranker):
    query, candidates, labels = some(2, 7)
    labels = labels_for(ranker, labels)
    scores = ranker(query, candidates, labels).scores
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = ranker(query, candidates[:, order], None if labels is None else labels[:, order]).scores
    torch.testing.assert_close(moved, scores[:, order], atol=1e-10, rtol=0)
    assert scores.std(1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("bound", ["bind", "role"])
def test_the_released_network_knows_neither_the_query_nor_which_tokens_belong_together(bound):
    query, candidates, _ = some(2, 5)
    swapped = candidates.clone()
    if bound == "bind":  # the query with a candidate
        swapped[:, 2], other, places = query, candidates[:, 2], [0, 1, 3, 4]
    else:  # tokens of two candidates
        swapped[:, [0, 3], 1:], other, places = candidates[:, [3, 0], 1:], query, [0, 1, 2, 3, 4]
    for ranker, blind in ((make_ranker(legacy=True), True), (make_ranker(**{bound: False}), False)):
        change = (ranker(query, candidates).scores - ranker(other, swapped).scores)[:, places].abs()
        assert change.max() < 1e-10 if blind else change.min() > 1e-4


@torch.no_grad()
def test_every_token_counts(ranker):
    given = dict(zip(("query", "candidates", "labels"), some(1, 3)))
    if ranker.label is None:
        del given["labels"]
    before = ranker(*given.values()).scores
    for part, values in given.items():
        for place in range(5):
            changed = given | {part: values.clone()}
            changed[part][..., place, :] = torch.rand(values.shape[-1])
            assert (ranker(*changed.values()).scores - before).abs().max() > 1e-5, (part, place)


@torch.no_grad()
def test_labels_may_be_unknown():
    ranker = make_ranker()
    query, candidates, labels = some(2, 4)
    unknown = ranker(query, candidates).scores
    assert (ranker(query, candidates, labels).scores - unknown).abs().min() > 1e-5
    assert (ranker(query, candidates, 0 * labels).scores - unknown).abs().min() > 1e-6  # known to be empty


@torch.no_grad()
def test_lists_may_have_any_length_and_a_batch_is_its_lists(ranker):
    for k in (1, 2, 3, 10, 50):
        query, candidates, labels = some(3, k)
        labels = labels_for(ranker, labels)
        scores = ranker(query, candidates, labels).scores
        assert scores.shape == (3, k)
        for b in range(3):
            known = None if labels is None else labels[b : b + 1]
            one = ranker(query[b : b + 1], candidates[b : b + 1], known).scores
            torch.testing.assert_close(one, scores[b : b + 1], atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("t", [1, 2, 5])
def test_padding_is_neither_seen_nor_scored(ranker, t):
    query, candidates, labels = some(2, 4, t)
    labels = labels_for(ranker, labels)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, [0, 3]] = False
    candidates[~mask] = torch.nan
    if labels is not None:
        labels[~mask] = torch.nan
    metric = torch.rand(2, 4).masked_fill(~mask, torch.nan)
    output = ranker(query, candidates, labels, mask, metric)
    assert (output.scores[~mask] == -torch.inf).all() and output.loss.isfinite()
    assert torch.equal(output.scores > -torch.inf, mask)
    short = ranker(query[1:], candidates[1:, 1:3], None if labels is None else labels[1:, 1:3]).scores
    torch.testing.assert_close(output.scores[1:, 1:3], short, atol=1e-10, rtol=0)


def test_one_token_an_image_of_another_width():
    ranker = make_ranker(input_size=40)
    query, candidates, _ = some(2, 6, 1, 40)
    output = ranker(query, candidates, metric=torch.rand(2, 6))
    output.loss.backward()
    assert output.scores.shape == (2, 6) and ranker.project.weight.grad.abs().sum() > 0
    assert ranker(query, candidates, torch.rand(2, 6, 1, 3)).scores.shape == (2, 6)


# ---- the loss


def test_the_loss_is_made_of_its_parts_and_goes_by_ranks():
    query, candidates, _ = some(3, 4)
    metric = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    ranker = make_ranker()
    scores = ranker(query, candidates).scores

    def loss(**weights: float) -> Tensor:
        for name, value in weights.items():
            setattr(ranker.config, name, value)
        return ranker(query, candidates, metric=metric).loss

    pair, sort = pairwise_margin_loss(scores, metric), neural_ndcg_loss(scores, ranks(metric))
    torch.testing.assert_close(loss(), pair + 0.5 * sort)
    torch.testing.assert_close(loss(sort_weight=0.0), pair)
    torch.testing.assert_close(loss(mse_weight=2.0), pair + 2 * (scores.float() - metric).square().mean())
    other = pairwise_margin_loss(scores, metric, 0.1) + neural_ndcg_loss(scores, ranks(metric), 0.2)
    torch.testing.assert_close(loss(mse_weight=0.0, margin=0.1, sort_weight=1.0, sort_temperature=0.2), other)
    assert ranker(query, candidates).loss is None
    mask = torch.ones(3, 4, dtype=torch.bool)
    ranker.config.mse_weight = 1.0
    torch.testing.assert_close(ranker(query, candidates, mask=mask, metric=metric).loss, loss())


# ---- pixels


@pytest.fixture
def encoder():
    return tiny_encoder()


def test_pixels_go_the_way_of_cached_tokens(encoder):
    ranker = make_ranker().float().attach(encoder).train()
    query, candidates = torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 4, 3, SIZE, SIZE)
    tokens = encoder(query)["tokens"], encoder(candidates.flatten(0, 1))["tokens"].unflatten(0, (2, 4))
    by_pixels = ranker(query_pixels=query, candidate_pixels=candidates, metric=torch.rand(2, 4))
    torch.testing.assert_close(by_pixels.scores, ranker(*tokens).scores, atol=1e-5, rtol=0)
    mixed = ranker(query_pixels=query, candidate_tokens=tokens[1]).scores
    torch.testing.assert_close(mixed, by_pixels.scores, atol=1e-5, rtol=0)
    by_pixels.loss.backward()
    assert all(value.grad is None and not value.requires_grad for value in encoder.parameters())
    assert not encoder.training and not encoder.backbone.training and ranker.training
    assert ranker.encoder is encoder
    assert not any(name.startswith(("encoder", "_encoder")) for name in ranker.state_dict())
    assert not {id(p) for p in encoder.parameters()} & {id(p) for p in ranker.parameters()}


def test_the_config_finds_the_encoder_again(encoder, tmp_path):
    encoder.backbone.save_pretrained(tmp_path / "encoder")
    named = type(encoder).from_pretrained(str(tmp_path / "encoder"))
    make_ranker().float().attach(named).save_pretrained(tmp_path / "ranker")
    again = ListwiseRanker.from_pretrained(tmp_path / "ranker")
    assert again.config.encoder["id"] == str(tmp_path / "encoder")
    query, candidates = torch.rand(1, 3, SIZE, SIZE), torch.rand(1, 3, 3, SIZE, SIZE)
    expected = make_ranker().float().attach(named)(query_pixels=query, candidate_pixels=candidates).scores
    found = again(query_pixels=query, candidate_pixels=candidates).scores
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # other weights under the same name
    tiny_encoder(1).backbone.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="trained on those of the encoder"):
        ListwiseRanker.from_pretrained(tmp_path / "ranker")(query_pixels=query, candidate_pixels=candidates)


def test_another_encoder_is_refused(encoder):
    ranker = make_ranker(encoder_fingerprint="0123").float()
    with pytest.raises(ValueError, match=f"encoder {encoder.fingerprint}.*fingerprint 0123"):
        ranker.attach(encoder)
    with pytest.raises(ValueError, match=f"tokens of width {D}, but this ranker takes width 24"):
        make_ranker(hidden_size=24).attach(encoder)
    with pytest.raises(ValueError, match="attach the encoder"):
        make_ranker()(query_pixels=torch.rand(1, 3, 32, 32), candidate_pixels=torch.rand(1, 2, 3, 32, 32))


# ---- saving


def test_a_saved_ranker_is_the_same_also_without_the_package(tmp_path):
    ranker = make_ranker(list_length=7, head="own", encoder_fingerprint="abc").float()
    query, candidates, labels = (part.float() for part in some(2, 4))
    expected = ranker(query, candidates, labels).scores
    ranker.save_pretrained(tmp_path)
    for again in (ListwiseRanker.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(again, ListwiseRanker) and torch.equal(again(query, candidates, labels).scores, expected)
        assert again.config.list_length == 7 and again.config.encoder_fingerprint == "abc" and not again.training
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ListwiseRankerConfig)
    torch.save([query, candidates, labels], tmp_path / "given.pt")
    code = f"""
import json, sys
sys.modules["hf_effdl"] = None  # importing it raises
import torch
from transformers import AutoModel
ranker = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
print(json.dumps(ranker(*torch.load({str(tmp_path / "given.pt")!r}, weights_only=True)).scores.tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected.detach(), atol=1e-6, rtol=0)


# ---- what cannot be right


def test_sizes_that_do_not_fit_are_named():
    for changes, said in (
        ({"head": "two"}, "head='two'.*'none', 'own', 'tied'"),
        ({"num_attention_heads": 5}, "768 cannot be divided"),
        ({"legacy": True, "input_size": 5}, "input_size=5 is not hidden_size=768"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"list_length": 1}, "list_length=1"),
        ({"label_channels": 0}, "label_channels=0"),
    ):
        with pytest.raises(ValueError, match=said):
            ListwiseRankerConfig(**changes)


def test_inputs_that_do_not_fit_are_named():
    ranker, (query, candidates, labels) = make_ranker(encoder_fingerprint="abc"), some(2, 3)
    for given, said in (
        ((query[..., :9], candidates), "width 9, but this ranker takes width 16 of the encoder abc"),
        ((query[:1], candidates), r"query tokens \(1, 5, 16\) and candidate tokens \(2, 3, 5, 16\)"),
        ((query[:, :1], candidates), r"pass \(B, T, d\) and \(B, k, T, d\)"),
        ((query, candidates[0]), r"candidate_tokens of shape \(3, 5, 16\)"),
        ((query, None), "either candidate_tokens or candidate_pixels"),
        ((query, candidates, labels[:, :, :, :2]), r"candidate_labels of shape \(2, 3, 5, 2\): pass \(2, 3, 5, 3\)"),
        ((query, candidates, None, torch.ones(2, 4).bool()), r"mask of shape \(2, 4\)"),
        ((query, candidates, None, None, torch.rand(2, 1)), r"metric of shape \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            ranker(*given)
    with pytest.raises(ValueError, match="label_channels=None"):
        make_ranker(legacy=True)(query, candidates, labels)


# ---- many lists at once


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 60, 2**14])
def test_many_lists_are_scored_as_one_by_one(ranker, tokens, monkeypatch):
    monkeypatch.setattr(modeling_listwise_ranker, "TOKENS", tokens)
    query, candidates, labels = some(3, 9)
    labels = labels_for(ranker, labels)
    lists = torch.stack([torch.randperm(9)[:4] for _ in range(12)]).view(3, 4, 4)
    lists[0, 1, 2:] = lists[2, 3, 3:] = lists[1, 2] = -1
    scores = ranker.score_lists(query, candidates, lists, labels)
    assert scores.shape == lists.shape and torch.equal(scores == -torch.inf, lists < 0)
    for b in range(3):
        for number, places in enumerate(lists[b]):
            if len(here := places[places >= 0]):
                known = None if labels is None else labels[b : b + 1, here]
                one = ranker(query[b : b + 1], candidates[b : b + 1, here], known).scores[0]
                torch.testing.assert_close(scores[b, number, : len(here)].double(), one, atol=1e-6, rtol=0)


# ---- labels


def test_label_tokens_are_means_of_the_image_and_its_quarters():
    labels = torch.rand(2, 4, 3, 6, 8)
    found = label_tokens(labels)
    assert found.shape == (2, 4, 5, 3)
    parts = [labels, labels[..., :3, :4], labels[..., :3, 4:], labels[..., 3:, :4], labels[..., 3:, 4:]]
    for place, part in enumerate(parts):
        torch.testing.assert_close(found[:, :, place], part.mean((-2, -1)))


# ---- the strategy


class Known(ListwiseRanker):
    """Scores by one coordinate of an image's first token, so that the right ranking is known; and counts its work."""

    def __init__(self, config: ListwiseRankerConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[int, ...]] = []

    def score_lists(self, query_tokens, candidate_tokens, lists, candidate_labels=None):
        self.seen.append(tuple(lists.shape))
        value = (candidate_tokens[:, :, 0, 0])[:, None].expand(-1, lists.shape[1], -1)
        return value.gather(2, lists.clamp(min=0)).masked_fill(lists < 0, -torch.inf)


def known(length: int, **changes: object) -> Known:
    config = {"hidden_size": D, "num_attention_heads": 4, "label_channels": None, **changes}
    return Known(ListwiseRankerConfig(list_length=length, **config))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    encoder = tiny_encoder()
    pool = make_pool(tmp_path_factory.mktemp("pool"), count=24, encoder=encoder)
    return VisualInContextPipeline(make_model(encoder=encoder), pool=pool, selector="nearest")


def choose(pipe, selector, images, count=1, candidates=16, exclude=None):
    batch = pipe.preprocess({"images": images, "labels": None})
    queries = ranker_selector.Queries(batch["cells"], pipe.model.encoder(batch["views"]), exclude=exclude)
    return selector(queries, pipe.examples, count, candidates), queries


def photos(count: int, first: int = 100) -> list:
    from scenes import scene

    return [scene(number)[0] for number in range(first, first + count)]


@pytest.mark.parametrize("schedule", ["covering", "partitions", "random", "knock-out"])
@pytest.mark.parametrize("lengths", [(5,), (3, 5)])
def test_every_schedule_finds_what_the_ranker_knows(pipe, schedule, lengths):
    if schedule == "knock-out" and len(lengths) > 1:
        with pytest.raises(ValueError, match=r"one ranker, and here are those for \[3, 5\]"):
            RankerSelector([known(k) for k in lengths], schedule)
        return
    rankers = [known(k) for k in lengths]
    (scores, rows), queries = choose(pipe, RankerSelector(rankers, schedule, method="borda"), photos(3), 4)
    _, near = ranker_selector.nearest(queries, pipe.examples, 16, 16)
    truth = pipe.pool.tokens(near)[:, :, 0, 0]
    best = near.gather(1, truth.argsort(1, descending=True))
    assert scores.shape == rows.shape == (3, 4) and (scores.diff(dim=1) <= 0).all()
    if schedule == "random":  # not every pair is compared
        assert all(int(rows[b, 0]) in best[b, :3].tolist() for b in range(3))
    elif schedule == "partitions":  # as here: another one that won all of its lists may be level with the best
        assert torch.equal(scores[rows == best[:, :1]], scores[:, 0])
    else:
        assert torch.equal(rows[:, 0], best[:, 0])
    assert all(len(set(row)) == 4 and set(row) <= set(near[b].tolist()) for b, row in enumerate(rows.tolist()))
    # all queries in one call for each ranker, and one for each round of a tournament
    rounds = {"knock-out": 3 if lengths == (3,) else 2, "random": (3 if lengths[0] == 3 else 2) + 1}.get(schedule, 1)
    assert [shape[0] for shape in rankers[0].seen] == [3] * rounds and all(len(r.seen) <= rounds for r in rankers)
    assert all(shape[2] <= k for r, k in zip(rankers, lengths) for shape in r.seen)


def test_covering_lists_of_two_lengths_make_130_and_30_lists():
    rankers, generators = [known(5), known(10)], [torch.Generator().manual_seed(0)]
    selector = RankerSelector(rankers)
    tokens = torch.randn(1, 50, 5, D)
    found = selector.rank(torch.zeros(1, 5, D), tokens, None, generators)
    counts = [ranker.seen[0][1] for ranker in rankers]
    assert all(bound <= count <= 1.25 * bound + 1 for count, bound in zip(counts, (130, 30)))
    order, truth = found[0].argsort(), tokens[0, :, 0, 0].argsort()
    agreement = torch.corrcoef(torch.stack([order.argsort(), truth.argsort()]).float())[0, 1]
    assert agreement > 0.95
    RankerSelector(rankers, passes=3).rank(torch.zeros(1, 5, D), tokens, None, generators)
    assert [ranker.seen[1][1] for ranker in rankers] == [3 * count for count in counts]


@pytest.mark.parametrize("schedule", ["covering", "partitions", "random"])
def test_lists_depend_on_the_image_and_the_seed_alone(pipe, schedule):
    ranker = make_ranker(list_length=5).float()
    images = photos(4)
    (scores, rows), _ = choose(pipe, RankerSelector(ranker, schedule), images, 16)
    for order in ([2], [3, 0], [1, 3, 2]):
        (found, same), _ = choose(pipe, RankerSelector(ranker, schedule), [images[i] for i in order], 16)
        assert torch.equal(same, rows[order])
        torch.testing.assert_close(found, scores[order])
    (other, _), _ = choose(pipe, RankerSelector(ranker, schedule, seed=1), images, 16)
    assert not torch.allclose(other, scores)


class Moody(Known):
    """Its opinion of an image is another one in every list."""

    def score_lists(self, query_tokens, candidate_tokens, lists, candidate_labels=None):
        self.ranked = getattr(self, "ranked", [])
        scores = torch.rand(lists.shape).masked_fill(lists < 0, -torch.inf)
        self.ranked.append(lists.gather(2, scores.argsort(2, descending=True)))
        return scores


@pytest.mark.parametrize("method", ["hodge", "borda"])
@pytest.mark.parametrize("k", [3, 5])
def test_the_winner_of_a_tournament_is_chosen(pipe, k, method):
    torch.manual_seed(0)
    for number in range(5):
        ranker = Moody(ListwiseRankerConfig(hidden_size=D, label_channels=None, list_length=k))
        selector = RankerSelector(ranker, "knock-out", method=method)
        (_, rows), queries = choose(pipe, selector, photos(4, 200 + 4 * number))
        _, near = ranker_selector.nearest(queries, pipe.examples, 16, 16)
        final = ranker.ranked[-1]
        assert final.shape[1] == 1 and torch.equal(rows, near.gather(1, final[:, :, 0]))


def test_of_equally_good_candidates_the_nearest_is_chosen(pipe):
    for schedule in ranker_selector.SCHEDULES:
        ranker = make_ranker(list_length=5).float()
        ranker.predictor[2].weight.data.zero_()
        (_, rows), queries = choose(pipe, RankerSelector(ranker, schedule, method="borda"), photos(3))
        assert torch.equal(rows, ranker_selector.nearest(queries, pipe.examples, 1, 16)[1]), schedule


@pytest.mark.parametrize(
    ("schedule", "passes", "count"),
    [("random", None, 40), ("random", 3, 12), ("partitions", None, 40), ("partitions", 2, 8)],
)
def test_so_many_lists_are_ranked(pipe, schedule, passes, count):
    ranker = known(4)
    choose(pipe, RankerSelector(ranker, schedule, passes=passes), photos(2))
    assert ranker.seen[-1] == (2, count, 4)


def test_a_ranker_with_labels_sees_those_of_the_candidates(tmp_path, monkeypatch):
    given = []

    class Watched(Known):
        def score_lists(self, query_tokens, candidate_tokens, lists, candidate_labels=None):
            given.append((query_tokens, candidate_tokens, candidate_labels))
            return super().score_lists(query_tokens, candidate_tokens, lists)

    encoder = tiny_encoder()
    pool = make_pool(tmp_path, count=24, encoder=encoder)
    pipe = VisualInContextPipeline(make_model(encoder=encoder), pool=pool)
    config = {"hidden_size": D, "num_attention_heads": 4}
    selector = RankerSelector([Watched(ListwiseRankerConfig(list_length=5, **config)), known(3)])
    for exclude in (torch.tensor([7, -1]), None):
        (_, rows), queries = choose(pipe, selector, [pool.image(7), *photos(1)], 16, exclude=exclude)
        assert (7 in rows[0].tolist()) == (exclude is None)
        _, near = ranker_selector.nearest(queries, pipe.examples, 16, 16)
        torch.testing.assert_close(given[-1][0], queries.views["tokens"])
        torch.testing.assert_close(given[-1][1], pool.tokens(near))
        for b in range(2):
            expected = pool_label_tokens(pool, near[b].tolist(), pipe.visual_task)
            torch.testing.assert_close(given[-1][2][b], expected)
        assert expected.shape == (16, 5, 3) and 0 < expected[:, 0].min() and expected[:, 1:].std() > 0.01
        pool.remove(pool.ids[:1])  # another pool, whose labels are drawn anew
    with monkeypatch.context() as patch:  # but of the same one once
        choose(pipe, selector, photos(1), 16)
        patch.setattr(ranker_selector, "label_tokens", None)
        choose(pipe, selector, photos(1), 16)


def test_only_reliable_candidates_are_ranked(pipe):
    images = photos(3)
    (_, _), queries = choose(pipe, RankerSelector(known(5)), images)
    _, near = ranker_selector.nearest(queries, pipe.examples, 16, 16)
    left = {  # of the first query 9, and so 7 to 9 of the others; 4, fewer than a list; 1; none
        9: near[0, ::2].tolist() + [near[0, 1].item()],
        4: near[0, 3:7].tolist(),
        1: near[0, 5:6].tolist(),
        0: [row for row in range(24) if row not in near[0].tolist()],
    }
    for size, reliable in left.items():
        selector = RankerSelector(known(5), reliable=torch.tensor(reliable))
        (scores, rows), _ = choose(pipe, selector, images, 16)
        kept = [row for row in near[0].tolist() if row in reliable] if size else near[0].tolist()
        assert sorted(rows[0, : len(kept)].tolist()) == sorted(kept) and len(kept) == (size or 16)
        assert (scores[0, : len(kept)] > -torch.inf).all() and (scores[0, len(kept) :] == -torch.inf).all()
        # the others come behind, the nearer first
        assert rows[0, len(kept) :].tolist() == [row for row in near[0].tolist() if row not in kept]
        if size:
            truth = pipe.pool.tokens(torch.tensor(kept))[:, 0, 0]
            assert rows[0, 0] == kept[int(truth.argmax())] or size == 9
        alone, _ = choose(pipe, selector, images[:1], 16)
        assert torch.equal(alone[1][0], rows[0])
    reliable = torch.arange(0, 24, 2)
    (scores, rows), _ = choose(pipe, RankerSelector(known(5), reliable=reliable, fill=True), images, 12, 12)
    assert (rows % 2 == 0).all() and (scores > -torch.inf).all()


def test_what_the_strategy_cannot_do_is_named(pipe):
    broken = make_ranker(list_length=5).float()
    broken.predictor[2].bias.data.fill_(torch.nan)
    two, row_99 = [known(5), known(3)], torch.tensor([1, 99])
    for given, options, said in (
        ((known(5), "all"), {}, "schedule='all'"),
        ((known(5),), {"method": "mean"}, "method='mean'"),
        ((known(5),), {"passes": 0}, "passes=0"),
        ((known(5), "partitions"), {"passes": 1}, "passes=1.*partitions at least 2"),
        (([known(5), known(5)],), {}, r"2 rankers for lists of \[5\]"),
        (([],), {}, r"rankers for lists of \[\]"),
        ((known(5),), {"fill": True}, "fill=True"),
        ((known(5),), {"reliable": torch.ones(24).bool()}, "reliable is torch.bool"),
        ((two,), {"candidates": 4}, "K=4 candidates are not above the list length k=5"),
        ((two,), {"candidates": 5}, "K=5 candidates are not above the list length k=5"),
        ((known(5, encoder_fingerprint="0123"),), {}, f"of the encoder {pipe.pool.encoder['fingerprint']}.*0123"),
        ((known(5, hidden_size=8),), {}, f"width {D}, but this ranker takes width 8"),
        ((known(5),), {"reliable": row_99}, "names row 99, but the pool has 24"),
        ((broken,), {}, "scores are NaN"),
    ):
        candidates = options.pop("candidates", 16)
        with pytest.raises(ValueError, match=said):
            choose(pipe, RankerSelector(*given, **options), photos(1), 1, candidates)
    assert RankerSelector({3: known(5), 4: known(5)}).lengths == [3, 4]
