"""Label noise read off probes: definitions by hand, a brute-force likelihood, and recovery of what was simulated."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_effdl.samples.scores import noise as module
from hf_effdl.samples.scores.noise import (
    NOISY,
    TEMPERATURES,
    LabelNoise,
    agreement,
    confident_disagreement,
    fit_label_noise,
    fit_likelihoods,
    label_likelihoods,
    noise_rate,
)


NAN = float("nan")
few = settings(max_examples=60, deadline=None, derandomize=True)


def simulate(rows, count, contamination, temperature=1.0, seed=0):
    """Probes' mean predictions and labels that follow the model exactly, and which labels are wrong."""
    rng = np.random.default_rng(seed)
    honest = rng.dirichlet(np.full(count, 0.25), rows)
    truth = np.array([rng.choice(count, p=row) for row in honest])
    random = rng.random(rows) < contamination
    labels = np.where(random, rng.integers(0, count, rows), truth)
    # honest = p^(T), so the probes report p in proportion to honest^T: overconfident for T > 1
    p = honest**temperature
    return torch.from_numpy(p / p.sum(1, keepdims=True)), torch.from_numpy(labels), torch.from_numpy(labels != truth)


# ---- the vote


def test_agreement_is_the_vote_for_the_given_label():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]])
    assert agreement(p, torch.tensor([1, 2, 0, 2])).tolist() == [True, False, True, True]
    assert agreement(p.half(), [0, 0, 0, 0]).tolist() == [False, True, True, False]
    assert agreement(torch.tensor([[1.004, 0.0]]).bfloat16(), [0]).tolist() == [True]  # what rounding leaves above one


@few
@given(
    rows=st.integers(1, 60) | st.just(1300),
    options=st.sampled_from([{}, {"share": 0.25, "least": 1}, {"share": 1.0, "least": 5}, {"share": 0.1, "least": 5}]),
    seed=st.integers(0, 10**6),
)
def test_confident_disagreement_counts_among_the_surest_rows(rows, options, seed):
    rng = np.random.default_rng(seed)
    p, labels = rng.dirichlet(np.ones(3), rows), rng.integers(0, 3, rows)
    share, least = options.get("share", 0.1), options.get("least", 100)
    surest = sorted(range(rows), key=lambda i: -p[i].max())[: max(least, round(share * rows))]
    expected = np.mean([p[i].argmax() != labels[i] for i in surest])
    got = confident_disagreement(torch.from_numpy(p), torch.from_numpy(labels), **options)
    assert got == pytest.approx(expected, abs=1e-12)


# ---- the model


def test_the_posterior_of_a_good_label():
    p, labels = torch.tensor([[1.0, 0], [0.5, 0.5]]), torch.tensor([1, 0])
    for temperature in (0.25, 1.0, 3.0):
        assert LabelNoise(0.0, temperature, 2).p_clean(p, labels).tolist() == [1, 1]
    assert LabelNoise(0.2, 1.0, 2).p_clean(p, labels)[0] < 1e-9
    # likelihoods that single precision rounds to zero
    assert LabelNoise(0.0, 1.0, 2).posterior(torch.zeros(1)).tolist() == [1]
    p = torch.tensor([[0.64, 0.32, 0.04], [0.04, 0.32, 0.64]])
    honest = p.sqrt()[:, 0] / p.sqrt().sum(1)
    got = LabelNoise(0.3, 2.0, 3).p_clean(p, torch.tensor([0, 0]))
    torch.testing.assert_close(got, 0.7 * honest / (0.7 * honest + 0.1))


def test_the_likelihoods_kept_of_a_row_are_the_tempered_probabilities():
    assert float(TEMPERATURES[0]) == 0.25 and float(TEMPERATURES[-1]) == pytest.approx(3, abs=1e-3)
    p, labels, _ = simulate(50, 4, 0.2)
    kept = label_likelihoods(p, labels)
    assert kept.shape == (50, len(TEMPERATURES)) and kept.dtype == torch.float32
    for t, temperature in enumerate(TEMPERATURES.tolist()):
        tempered = p.clamp(min=1e-12) ** (1 / temperature)
        expected = (tempered / tempered.sum(1, keepdim=True))[torch.arange(50), labels]
        torch.testing.assert_close(kept[:, t].double(), expected, rtol=1e-5, atol=1e-30)
        noise = LabelNoise(0.25, temperature, 4)
        assert noise.place == t
        torch.testing.assert_close(noise.posterior(kept[:, t]), noise.p_clean(p, labels), rtol=1e-5, atol=1e-7)


# ---- the fit


def log_likelihood(p, labels, contamination, temperature):
    tempered = np.maximum(p.numpy(), 1e-12) ** (1 / temperature)
    honest = (tempered / tempered.sum(1, keepdims=True))[np.arange(len(p)), labels.numpy()]
    return np.log((1 - contamination) * honest + contamination / p.shape[1]).sum()


@pytest.mark.parametrize("contamination,temperature", [(0.0, 1.0), (0.1, 2.0), (0.3, 1.0), (0.5, 0.6), (1.0, 1.0)])
def test_the_fit_is_the_maximum_of_the_likelihood(contamination, temperature):
    p, labels, _ = simulate(800, 4, contamination, temperature, seed=1)
    fit = fit_label_noise(p, labels)
    shares = np.linspace(0, 0.6, 601)
    grid = np.array([[log_likelihood(p, labels, f, t) for f in shares[::10]] for t in TEMPERATURES.tolist()])
    assert log_likelihood(p, labels, fit.contamination, fit.temperature) >= grid.max() - 1e-4
    # along the contamination, at its temperature: the best of a fine grid is next to it, and the slope there is zero
    line = [log_likelihood(p, labels, f, fit.temperature) for f in shares]
    assert abs(shares[int(np.argmax(line))] - fit.contamination) <= 0.001
    if 0 < fit.contamination < 0.59:
        sides = [log_likelihood(p, labels, fit.contamination + step, fit.temperature) for step in (-1e-4, 1e-4)]
        assert abs(sides[1] - sides[0]) / 2e-4 < 1e-2
    # concave, which is what bisecting its slope needs
    assert (np.diff(line, 2) < 1e-9).all()
    assert 0 <= fit.contamination <= 0.6
    assert fit.classes == 4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("contamination", [0.0, 0.1, 0.4])
def test_the_fit_recovers_flips_and_calibration(contamination, temperature):
    p, labels, wrong = simulate(4000, 5, contamination, temperature)
    fit = fit_label_noise(p, labels)
    # honest doubt is not noise, whatever the scale of the logits; the standard error is about 0.011
    assert fit.contamination == pytest.approx(contamination, abs=0.03)
    assert fit.rate == pytest.approx(float(wrong.double().mean()), abs=0.03)
    # to two steps of the grid
    assert abs(math.log(fit.temperature / temperature)) <= 2 * math.log(float(TEMPERATURES[1] / TEMPERATURES[0]))
    # the posterior is calibrated: its mean is the share of labels that were not drawn at random
    assert float(fit.p_clean(p, labels).double().mean()) == pytest.approx(1 - contamination, abs=0.03)
    if contamination:
        clean = fit.p_clean(p, labels)
        assert clean[wrong].mean() < clean[~wrong].mean() - 0.3


def test_contamination_ends_at_nothing_and_at_six_tenths():
    # labels that are the vote of sure probes leave the slope negative at zero
    labels = torch.arange(300) % 3
    p = torch.full((300, 3), 0.05).scatter_(1, labels[:, None], 0.9)
    fit = fit_label_noise(p, labels)
    assert fit.contamination == fit.rate == noise_rate(p, labels) == 0.0
    excluded = fit_label_noise(p, (labels + 1) % 3)
    assert excluded.contamination == pytest.approx(0.6, abs=1e-9)
    assert excluded.rate == pytest.approx(0.4, abs=1e-9)  # without the random labels that happen to be right


def test_large_pools_are_fitted_on_rows_taken_at_random():
    # three sources interleaved, of which the third is all noise: every third row would say 0 or 1
    p, labels, _ = simulate(12_000, 4, 0.0)
    labels[2::3] = torch.from_numpy(np.random.default_rng(0).integers(0, 4, 4000))
    full = fit_label_noise(p, labels)
    assert full.contamination == pytest.approx(1 / 3, abs=0.03)
    with mock.patch.object(module, "_FIT_ROWS", 4000):
        part = fit_label_noise(p, labels)
        assert part == fit_label_noise(p, labels) == fit_likelihoods(label_likelihoods(p, labels), 4)
        assert part.contamination == pytest.approx(1 / 3, abs=0.05)
        assert part != full  # it did look at fewer
    with mock.patch.object(module, "_FIT_ROWS", 12_000):
        assert fit_label_noise(p, labels) == full


def test_a_fit_on_kept_likelihoods_or_coarser_numbers_is_the_fit_on_predictions():
    p, labels, _ = simulate(700, 6, 0.2)
    fit = fit_label_noise(p, labels)
    assert fit_likelihoods(label_likelihoods(p, labels), 6) == fit
    for kind, least in ((torch.float32, 1e-4), (torch.float16, 0.01)):
        coarse = p.to(kind)
        assert fit_label_noise(coarse, labels).contamination == pytest.approx(fit.contamination, abs=least)
        assert torch.equal(label_likelihoods(coarse, labels), label_likelihoods(coarse.double(), labels))
    assert (coarse == 0).any()


# ---- the rate


def test_the_noise_rate_is_the_larger_of_the_two_readings():
    p, truth, _ = simulate(1500, 4, 0.0)
    by_sureness = p.amax(1).argsort(descending=True)
    for wrong, larger in ((by_sureness[:75], "confident"), (by_sureness[150::4], "fitted")):
        labels = truth.clone()
        labels[wrong] = (labels[wrong] + 1) % 4
        readings = {"confident": confident_disagreement(p, labels), "fitted": fit_label_noise(p, labels).rate}
        assert max(readings, key=readings.get) == larger
        assert max(readings.values()) > min(readings.values()) + 0.1
        assert noise_rate(p, labels) == readings[larger]


@pytest.mark.parametrize("contamination", [0.0, 0.15, 0.3])
def test_the_noise_rate_tells_clean_pools_from_noisy_ones(contamination):
    assert NOISY == 0.05
    # sure and mostly right probes, as of an easy task
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, 3000)
    logits = rng.normal(size=(3000, 4)) + 6 * np.eye(4)[truth]
    labels = np.where(rng.random(3000) < contamination, rng.integers(0, 4, 3000), truth)
    p = torch.from_numpy(logits).softmax(1)
    rate = noise_rate(p, torch.from_numpy(labels))
    assert (rate > NOISY) == (contamination > 0)
    assert rate == pytest.approx(0.75 * contamination, abs=0.06)


# ---- bad input

USES = {
    "agreement": agreement,
    "confident_disagreement": confident_disagreement,
    "fit_label_noise": fit_label_noise,
    "noise_rate": noise_rate,
    "p_clean": LabelNoise(0.1, 1.0, 2).p_clean,
}


@pytest.mark.parametrize("use", USES)
def test_predictions_that_are_no_probabilities_are_refused(use):
    for p in [[0.5, 0.5], [[[0.5, 0.5]]], [[2.0, -1.0]], [[NAN, 0.5]], [[1.2, 0.0]], torch.zeros(0, 2)]:
        p = torch.as_tensor(p)
        with pytest.raises(ValueError) as error:
            USES[use](p, torch.zeros(len(p), dtype=torch.long))
        for part in (
            f"p has shape {tuple(p.shape)}",
            "outside [0, 1]",
            "mean probabilities (rows, classes), not logits",
        ):
            assert part in str(error.value)


@pytest.mark.parametrize("use", USES)
def test_labels_that_do_not_fit_are_refused(use):
    p = torch.full((3, 2), 0.5)
    for outside in (2, -1):
        with pytest.raises(ValueError, match=f"1 labels are outside the 2 classes 0..1.*{outside} at row 1"):
            USES[use](p, torch.tensor([0, outside, 1]))
    with pytest.raises(ValueError, match=r"labels have shape \(2,\) for 3 rows"):
        USES[use](p, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="integer class"):
        USES[use](p, torch.tensor([0, 0.5, 1]))
