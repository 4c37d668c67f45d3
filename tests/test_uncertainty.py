"""COPS' uncertainty (arXiv 2309.02476) and its rivals against worked numbers, naive covariances and the theory."""

import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from hf_effdl.samples.drawing.probabilities import inclusion_probabilities
from hf_effdl.samples.scores import uncertainty as module
from hf_effdl.samples.scores.uncertainty import (
    LEAST_SPREAD,
    bald,
    check_labels,
    check_logits,
    check_spread,
    el2n,
    entropy,
    least_confidence,
    margin,
    mean_probability,
    p_label,
    uncertainty,
)


NAN, INF = float("nan"), float("inf")
few = settings(max_examples=60, deadline=None, derandomize=True)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def classes(rows, count, seed=0):
    return torch.randint(0, count, (rows,), generator=generator(1000 + seed))


def close(got, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=rtol, atol=atol)


# ---- worked numbers

WORKED = torch.tensor([[[2, 0, -1], [1, 0.5, -0.5], [3, -1, 0], [1.5, 0.25, -0.75]]], dtype=torch.float64)


@pytest.mark.parametrize(
    "gauge,with_labels,without",
    [
        ("invariant", (0.295413, 1.211575, 0.480949), 0.573045),
        ("drop-first", (0.091668, 0.568989, 0.478571), 0.277327),
    ],
)
def test_uncertainty_has_the_worked_numbers(gauge, with_labels, without):
    close(mean_probability(WORKED)[0], [0.761256, 0.167170, 0.071574], rtol=0, atol=1e-6)
    close(uncertainty(WORKED.expand(3, -1, -1), torch.arange(3), gauge), with_labels, rtol=0, atol=1e-6)
    close(uncertainty(WORKED, gauge=gauge), [without], rtol=0, atol=1e-6)


# ---- naive references, one row at a time


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def naive_uncertainty(logits, labels, gauge):
    """`sqrt(s^T Sigma s)` and `sqrt(tr(Phi Sigma))` with the covariance built."""
    found = []
    for i, z in enumerate(logits):
        p = torch.from_numpy(softmax(z.numpy())).mean(0)
        sigma = torch.cov(z.T).reshape(len(p), len(p))
        phi = p.diag() - p.outer(p)
        first = 1 if gauge == "drop-first" else 0
        sigma, phi = sigma[first:, first:], phi[first:, first:]
        if labels is None:
            found.append((phi @ sigma).trace().clamp(min=0).sqrt())
        else:
            s = (p - one_hot(labels[i], len(p)))[first:]
            found.append((s @ sigma @ s).clamp(min=0).sqrt())
    return torch.stack(found)


@few
@given(
    rows=st.integers(1, 7),
    probes=st.integers(2, 6),
    count=st.integers(2, 5),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    gauge=st.sampled_from(["invariant", "drop-first"]),
    chunk=st.sampled_from([1, 24, 60, 2**22]),
)
def test_uncertainty_is_the_quadratic_form_of_the_covariance(rows, probes, count, seed, scale, gauge, chunk):
    logits, labels = scale * normal(rows, probes, count, seed=seed), classes(rows, count, seed)
    before = logits.clone()
    with mock.patch.object(module, "_CHUNK", chunk):  # however the rows are cut
        close(uncertainty(logits, labels, gauge), naive_uncertainty(logits, labels, gauge), rtol=1e-7, atol=1e-9)
        close(uncertainty(logits, gauge=gauge), naive_uncertainty(logits, None, gauge), rtol=1e-7, atol=1e-9)
    assert torch.equal(logits, before)


@few
@given(
    rows=st.integers(1, 7),
    probes=st.integers(1, 5),
    count=st.integers(2, 5),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 24, 2**22]),
)
def test_the_rival_scores_are_their_definitions(rows, probes, count, seed, chunk):
    logits, labels = 2 * normal(rows, probes, count, seed=seed), classes(rows, count, seed)
    each = softmax(logits.numpy())
    expected = {name: [] for name in ("entropy", "margin", "least_confidence", "bald", "el2n", "p_label")}
    for i, q in enumerate(each):
        p = q.mean(0)
        high, second = sorted(p, reverse=True)[:2]
        y = int(labels[i])
        expected["entropy"].append(-sum(v * math.log(v) for v in p))
        expected["margin"].append(high - second)
        expected["least_confidence"].append(1 - high)
        inner = np.mean([-sum(v * math.log(v) for v in row) for row in q])
        expected["bald"].append(expected["entropy"][-1] - inner)
        expected["el2n"].append(np.mean([np.linalg.norm(row - np.eye(count)[y]) for row in q]))
        expected["p_label"].append(p[y])
    with mock.patch.object(module, "_CHUNK", chunk):
        got = {f.__name__: f(logits, labels) for f in (entropy, margin, least_confidence, bald, el2n, p_label)}
    for name, values in expected.items():
        close(got[name], values, rtol=1e-9, atol=1e-12)
    close(mean_probability(logits), each.mean(1))


def test_bald_is_zero_where_the_probes_agree_and_never_below():
    agreed = normal(500, 1, 7).expand(-1, 5, -1).float()
    assert ((0 <= bald(agreed)) & (bald(agreed) < 1e-6)).all()
    # two probes that are sure of different classes: all of the entropy is between them
    close(bald(torch.tensor([[[60.0, 0], [0, 60.0]]])), [math.log(2)], rtol=1e-6)


# ---- identities that hold for any logits


@few
@given(
    rows=st.integers(1, 5),
    probes=st.integers(2, 6),
    count=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    gauge=st.sampled_from(["invariant", "drop-first"]),
)
def test_the_mean_over_labels_of_the_squared_uncertainty_is_that_without_labels(rows, probes, count, seed, gauge):
    logits = 3 * normal(rows, probes, count, seed=seed)
    squares = torch.stack([uncertainty(logits, torch.full((rows,), y), gauge).square() for y in range(count)], 1)
    close((mean_probability(logits) * squares).sum(1), uncertainty(logits, gauge=gauge).square(), rtol=1e-10)


def test_a_constant_on_all_logits_of_a_probe_changes_nothing():
    logits, labels = normal(200, 8, 4), classes(200, 4)
    for levels in (normal(1, 8, 1, seed=1), normal(200, 8, 1, seed=2)):  # of a probe, or of a probe and row
        for given_labels in (labels, None):
            moved = uncertainty(logits + 2 * levels, given_labels) - uncertainty(logits, given_labels)
            assert moved.abs().max() < 1e-12


def test_the_released_gauge_is_right_where_the_first_logit_is_zero():
    # so u is the invariant one after each probe's first logit is taken out
    logits, labels = normal(50, 5, 4), classes(50, 4)
    anchored = logits - logits[..., :1]
    close(uncertainty(anchored, labels, "drop-first"), uncertainty(logits, labels))
    close(uncertainty(anchored, gauge="drop-first"), uncertainty(logits))


# ---- precision


@pytest.mark.parametrize("gauge", ["invariant", "drop-first"])
def test_float32_is_as_good_as_float64_where_the_probes_are_sure(gauge):
    logits, labels = (30 * normal(3000, 1, 6) + 2 * normal(3000, 5, 6, seed=1)).float(), classes(3000, 6)
    p = mean_probability(logits)
    labels[::2] = p.argmax(1)[::2]
    # p - 1 is nothing in float32 for a third of the rows
    assert ((1 - p[::2].amax(1)) == 0).double().mean() > 0.3
    for given_labels in (labels, None):
        wide = uncertainty(logits.double(), given_labels, gauge)
        assert wide.min() < 1e-12 < 1 < wide.max()
        got = uncertainty(logits, given_labels, gauge)
        # squares below 1e-38 underflow
        torch.testing.assert_close(got.double(), wide, rtol=1e-3, atol=1e-18)


def test_large_levels_cost_float32_nothing():
    # multiples of 1/64 below 2^15 are exact in float32, so every difference to float64 is ours
    logits = (64 * normal(400, 6, 5)).round() / 64
    levels = (64 * 16_000 * normal(400, 6, 1, seed=1).clamp(-1, 1)).round() / 64
    labels = classes(400, 5)
    for given_labels in (labels, None):
        got = uncertainty((logits + levels).float(), given_labels)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), uncertainty(logits, given_labels), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    logits, labels = normal(100, 5, 4).to(dtype), classes(100, 4)
    for score in (uncertainty, el2n, p_label, entropy, margin, least_confidence, bald):
        got = score(logits, labels)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, score(logits.float(), labels), rtol=0, atol=0)
    assert mean_probability(logits).dtype == torch.float32
    assert uncertainty(logits.double(), labels).dtype == torch.float64


# ---- one sigmoid logit


@pytest.mark.parametrize("shape", [(300, 6), (300, 6, 1)])
def test_a_single_logit_counts_as_the_two_classes_zero_and_z(shape):
    z = 2 * normal(*shape)
    both = torch.stack([torch.zeros(300, 6, dtype=torch.float64), z.view(300, 6)], 2)
    labels = classes(300, 2)
    for score in (uncertainty, entropy, margin, least_confidence, bald, el2n, p_label):
        close(score(z, labels), score(both, labels))
    close(uncertainty(z), uncertainty(both))
    close(mean_probability(z), both.softmax(2).mean(1))
    # in the released gauge by the population's deviation, as the released code has it
    z = z.view(300, 6)
    p, deviation = z.sigmoid().mean(1), z.std(1, correction=0)
    close(uncertainty(z, labels, "drop-first"), (p - labels).abs() * deviation)
    close(uncertainty(z, gauge="drop-first"), (p * (1 - p)).sqrt() * deviation)
    close(uncertainty(both, labels, "drop-first"), (p - labels).abs() * z.std(1))


# ---- the theory on a softmax regression: x = (1, three t_6 variates), 4 classes, labels of the model


def test_the_uncertainty_of_the_right_covariance_is_the_optimal_score_row_by_row():
    g, rows, degrees = generator(1), 5000, 3 * 4
    variates = torch.randn(rows, 3, dtype=torch.float64, generator=g)
    variates /= (torch.randn(6, rows, 3, dtype=torch.float64, generator=g).square().sum(0) / 6).sqrt()
    x = torch.cat([torch.ones(rows, 1, dtype=torch.float64), variates], 1)
    right = 1.2 * torch.randn(3, 4, dtype=torch.float64, generator=g)

    def logits(b):
        return torch.cat([torch.zeros(rows, 1, dtype=torch.float64), x @ b.T], 1)

    y = torch.multinomial(logits(right).softmax(1), 1, generator=g)[:, 0]
    p = logits(right).softmax(1)[:, 1:]
    phi = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    fisher = torch.einsum("nkl,ni,nj->kilj", phi, x, x).reshape(degrees, degrees) / rows
    spread = torch.einsum("ni,kilj,nj->nkl", x, fisher.inverse().reshape(3, 4, 3, 4), x)
    s = p - one_hot(y, 4)[:, 1:]
    # probes whose covariance is the inverse Fisher matrix: two on either side along each column of its root
    width = 0.004
    offsets = width * torch.linalg.cholesky(fisher.inverse()).T.reshape(degrees, 3, 4)
    probes = torch.stack([logits(b) for b in right + torch.cat([offsets, -offsets])], 1)
    unit = width * math.sqrt(2 / (2 * degrees - 1))
    u_xy, u_x = uncertainty(probes, y) / unit, uncertainty(probes) / unit
    torch.testing.assert_close(u_xy, torch.einsum("nk,nkl,nl->n", s, spread, s).sqrt(), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(u_x, (phi * spread).sum((1, 2)).sqrt(), rtol=2e-3, atol=2e-4)
    assert float(u_x.square().mean()) == pytest.approx(degrees, abs=2e-3)  # the number of parameters

    def excess(probabilities):
        """To first order, of the loss of a model trained on the draw."""
        return float(((1 / probabilities - 1) * u_xy.square()).sum())

    best = excess(inclusion_probabilities(u_xy, 750))
    assert all(excess(inclusion_probabilities(u_xy**power, 750)) > best for power in (0.9, 1.1))


# ---- probes of the same sample


def twins(spread, dtype=torch.float64):
    """Two probes on 6 rows, their logits z (1 + spread) and z (1 - spread)."""
    z = torch.tensor([3.0, -3.0], dtype=torch.float64).expand(6, 1, 2)
    return torch.cat([z * (1 + spread), z * (1 - spread)], 1).to(dtype)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_probes_agree_when_their_spread_is_a_tiny_share_of_the_logits_own(chunk):
    assert 1e-5 < LEAST_SPREAD < 1e-2
    with mock.patch.object(module, "_CHUNK", chunk):
        check_spread(twins(1.01 * LEAST_SPREAD))
        for spread in (0.99 * LEAST_SPREAD, 0.0):
            with pytest.raises(ValueError, match=re.escape(f"relative spread {spread:.1e}")):
                check_spread(twins(spread))
        # one row on which they differ is enough
        logits = twins(0.0)
        logits[4] = twins(0.5)[0]
        check_spread(logits)


def test_levels_neither_hide_nor_pretend_a_spread():
    check_spread(twins(1.01 * LEAST_SPREAD) + 1000)  # a level that the probes share is not the size of the logits
    assert uncertainty(torch.tensor([[1.0, 2.0]])) > 0  # for single logits the level is the logit itself
    moved = twins(0.0)
    moved[:, 0] += 5  # a level of one probe means nothing
    for logits in (moved, torch.ones(5, 3), torch.zeros(3, 4, 5)):
        with pytest.raises(ValueError, match=f"probes agree on all {len(logits)} rows.*bootstrap"):
            uncertainty(logits)


# ---- outliers and wrong labels: what clipping and damping are for


# ---- bad input


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("score", [uncertainty, entropy, margin, least_confidence, bald, el2n, p_label])
def test_values_that_are_not_finite_are_refused_with_their_rows(score, bad):
    logits = normal(9, 3, 4)
    logits[5, 1, 2], logits[7, 0, 0] = bad, bad
    with mock.patch.object(module, "_CHUNK", 24), pytest.raises(ValueError, match="2 rows.*first at row 5.*diverged"):
        score(logits, classes(9, 4))


@pytest.mark.parametrize("outside,count", [(-1, 4), (4, 4), (2, 1)])
def test_labels_outside_the_classes_are_refused_with_the_first(outside, count):
    logits, labels = normal(6, 3, count), torch.zeros(6, dtype=torch.long)
    labels[3] = labels[4] = outside
    expected = f"2 labels are outside the {max(count, 2)} classes 0..{max(count, 2) - 1}.*{outside} at row 3"
    for score in (uncertainty, el2n, p_label):
        with pytest.raises(ValueError, match=expected):
            score(logits, labels)


SIX = normal(6, 3, 4)
REFUSED = [
    *((uncertainty, (normal(*shape),), r"one probe \(M = 1\).*2 or more") for shape in [(5, 1, 3), (5, 1), (5, 1, 1)]),
    *(
        (uncertainty, (normal(*shape),), r"\(rows, probes, classes\), or \(rows, probes\)")
        for shape in [(6, 3, 4, 1), (6,)]
    ),
    *(
        (score, (torch.zeros(shape),), "nothing to score")
        for shape in [(0, 3, 4), (6, 0, 4), (6, 3, 0), (0, 3)]
        for score in (uncertainty, entropy)
    ),
    *(
        (uncertainty, (SIX, torch.zeros(shape).long()), "labels have shape .* for 6 rows")
        for shape in [5, (6, 1), 1, ()]
    ),
    (uncertainty, (torch.ones(6, 3, 4, dtype=torch.long),), "logits are of type torch.int64.*floating-point"),
    *(
        (uncertainty, (SIX, labels), "labels are of type torch.float32.*integer class")
        for labels in (torch.full((6,), 0.5), torch.tensor([0, 1, 0.5, 1, 2, 3]), torch.full((6,), NAN))
    ),
    (uncertainty, (SIX, None, "first"), "gauge='first'.*'invariant', 'drop-first'"),
    (el2n, (SIX, None), "el2n needs the label.*labels="),
    (p_label, (SIX, None), "p_label needs the label.*labels="),
]


def test_what_cannot_be_scored_is_refused():
    for score, arguments, message in REFUSED:
        with pytest.raises((ValueError, TypeError), match=message):
            score(*arguments)
    assert entropy(normal(5, 1, 3)).shape == (5,)  # of one probe the spread alone is unknown


def test_lists_arrays_and_whole_floats_are_taken():
    logits, labels = normal(6, 3, 4), classes(6, 4)
    expected = uncertainty(logits, labels)
    assert torch.equal(uncertainty(logits.numpy(), labels.numpy()), expected)
    assert torch.equal(uncertainty(logits, labels.tolist()), expected)
    for dtype in (torch.float32, torch.uint8, torch.int32):
        assert torch.equal(uncertainty(logits, labels.to(dtype)), expected)
    assert check_labels([0.0, 3.0], 4, 2).dtype == torch.int64
    checked, none = check_logits(normal(6, 3).half())
    assert checked.shape == (6, 3, 1) and checked.dtype == torch.float32 and none is None


@pytest.mark.parametrize("scale", [1e20, 1e-24])
def test_large_and_small_logits_have_uncertainties_in_their_units_or_are_refused_by_row(scale):
    logits, labels = normal(6, 3, 4).float() * scale, classes(6, 4)
    found = uncertainty(logits, labels)
    assert found.dtype == torch.float32 and found.isfinite().all() and (found > 0.01 * scale).all()
    assert torch.allclose(found.double(), uncertainty(logits.double(), labels), rtol=1e-5, atol=0)
    logits = normal(6, 3, 4)
    logits[2] *= 1e200
    with pytest.raises(ValueError, match="of 1 rows are NaN or infinite, the first at row 2"):
        uncertainty(logits)
