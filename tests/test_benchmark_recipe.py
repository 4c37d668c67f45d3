"""The benchmark of the recipe: every arm beside the same search, at equal epochs or equal training MACs."""

import pytest
import torch
from benchmarks import importable


@pytest.fixture(scope="module")
def script():
    with importable("recipe_mnist") as found:
        yield found["recipe_mnist"]


ARMS = (
    "path",
    "group lasso",
    "new weights, path's widths",
    "path, refitted",
    "OBS, path's widths",
    "path, Gram's ridge",
    "paths averaged",
    "scratch, uniform widths",
    "scratch, path's widths, equal MACs",
)


@pytest.fixture(scope="module")
def rows(script):
    """A row of most arms, of a net whose epoch is one batch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 10
    images = torch.randn(128, 1, 14, 14, generator=generator) + labels[:, None, None, None] / 3
    run = script.Run("bn14", (images, labels), (images[:64], labels[:64]))
    searched = script.search(run, "path", 1, 0.25)
    return {arm: script.one_row(run, arm, 1, 0.25, lambda *given: searched) for arm in ARMS}, searched, run


@pytest.mark.slow
def test_all_arms_hold_the_budget_and_train_for_as_long_or_for_as_many_macs(script, rows):
    rows, found, run = rows
    assert found.step <= script.WITHIN * run.steps
    for arm, row in rows.items():
        assert row["macs"] <= 0.25 and 0 <= row["after"] <= 100, arm
        if arm in script.RECIPE:
            assert row["steps"] == run.steps - found.step
            searches = 3 if "averaged" in arm else 1
            assert row["cost"] == pytest.approx((searches * found.step + row["steps"] * row["macs"]) / run.steps)
        elif not arm.endswith("equal MACs"):
            assert row["steps"] == run.steps
        else:
            assert row["cost"] == pytest.approx(rows["path"]["cost"], rel=0.5 / row["steps"])
    units = rows["path"]["units"]
    assert all(
        rows[arm]["units"] == units for arm in rows if "path" in arm and "Gram" not in arm and "paths" not in arm
    )
    shares = [size / of for size, of in zip(rows["scratch, uniform widths"]["units"].values(), (16, 24, 32, 32))]
    assert max(shares) - min(shares) < 1 / 16


def test_a_ridge_weighted_by_two_is_that_of_half_the_nu(script, rows):
    run, duals = rows[2], []
    for weight, nu in ((2.0, 8.0), (1.0, 4.0)):
        torch.manual_seed(0)
        model = script.Classifier(script.MNIST.build("bn14"))
        groups = script.find_groups(model, {"pixel_values": run.data[0][:1]})
        optimizer = script.SplitLBI([group.param_group() for group in groups], lr=0.1, nu=nu)
        ridge = script.GramRidge(model, groups, run.data[0], optimizer)
        ridge.weights = {group.name: torch.full((group.units,), weight - 1) for group in groups}
        run.fit(model, [0.05] * 4, 0, optimizer=optimizer, after_step=lambda _, ridge=ridge: ridge.after_step(False))
        duals.append(
            torch.cat([unit["dual"] for unit in script.SparsePath.from_optimizer(optimizer, groups).units.values()])
        )
        assert ridge.energy(groups[0]).mean() == pytest.approx(1)
    torch.testing.assert_close(*duals, rtol=1e-4, atol=1e-6)


def test_units_by_chance_are_as_many_and_the_seeds(script, rows):
    _, found, _ = rows
    kept = {group.name: torch.arange(5) for group in found.groups}
    one, same, other = (script.drawn(kept, found.groups, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and len(one[name]) == 5 for name in kept)
    assert any(not torch.equal(one[name], other[name]) for name in kept)


@pytest.mark.slow
def test_on_cifar_the_channels_inside_the_blocks_go():
    with importable("recipe_cifar10", "recipe_mnist") as found:
        images, labels = torch.randn(128, 3, 32, 32), torch.arange(128) % 10
        run = found["recipe_cifar10"].run_of((images, labels), (images[:8], labels[:8]), width=4, epochs=5)
        searched = found["recipe_mnist"].search(run, "path", 0, 0.5)
        row = found["recipe_mnist"].one_row(run, "path, even order", 0, 0.5, lambda *given: searched)
    assert row["macs"] <= 0.5 and row["steps"] == 4 and 0.5 < row["cost"] < 0.7
    assert list(row["units"]) == [f"net.net.layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1, 2)]
