"""Numbers in texts are those of the committed rows, and arms that a sentence compares have one schedule."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from benchmarks import FOLDER, importable


ROOT = Path(__file__).parents[1]
# a difference in points and its standard error
NUMBER = re.compile(r"([+-]?)(\d+\.\d\d),? \((?:SE )?(\d+\.\d\d)\)|([+-])(\d+\.\d\d), SE (\d+\.\d\d)")
STRUCTURE = "structure_mnist"
RECIPE = "recipe_mnist"
TICKETS = "tickets_mnist"
CIFAR, NARROW = "recipe_cifar10", "ResNet-20 of 8 channels, 50,000 images, 12 epochs"
GROWTH = "growth_mnist"
# what pages claim: rows, which of them, the arm that is ahead, the arm beside it
LATE_L2 = (STRUCTURE, ("bn", "0.1"), "path, late", "global L2")
LATE_LASSO = (STRUCTURE, ("bn", "0.1"), "path, late", "group lasso, same unit")
EARLY_LASSO = (STRUCTURE, ("bn", "0.1"), "group lasso, same unit, early", "path, early")
SCRATCH = (STRUCTURE, ("bn", "0.1"), "scratch, widths of path", "path, early")
NEW_25, NEW_10 = ((STRUCTURE, ("bn14", budget), "path, early", "random, early") for budget in ("0.25", "0.1"))
NEW_L2, NEW_BN = ((STRUCTURE, ("bn14", "0.25"), "path, early", f"{arm}, early") for arm in ("global L2", "BN weight"))
UNIFORM, WIDTHS = (f"scratch, {widths} widths, equal MACs" for widths in ("uniform", "path's"))
SMALL = "path, even order"  # what `train_small` does
QUARTER, TENTH, LONG_SEARCH = ("bn14", 0.25, 0.2), ("bn14", 0.1, 0.1), ("bn14", 0.1, 0.2)
SMALL_25 = (RECIPE, QUARTER, SMALL, UNIFORM)
SMALL_25_WIDTHS = (RECIPE, QUARTER, SMALL, WIDTHS)
SMALL_25_NEW = (RECIPE, QUARTER, "path", "new weights, path's widths")
SMALL_25_RANDOM = (RECIPE, QUARTER, SMALL, "random")
SMALL_10 = (RECIPE, TENTH, SMALL, UNIFORM)
SMALL_10_RANDOM = (RECIPE, TENTH, SMALL, "random")
SMALL_10_PATH = (RECIPE, TENTH, SMALL, "path")
SMALL_10_L2 = (RECIPE, TENTH, SMALL, "global L2, even order")
L2_SMALL_10 = (RECIPE, TENTH, "global L2, even order", SMALL)
SMALL_10_GRAM, SMALL_10_MEAN = (
    (RECIPE, TENTH, SMALL, f"{a}, even order") for a in ("path, Gram's ridge", "paths averaged")
)
LONG_10 = (RECIPE, LONG_SEARCH, UNIFORM, "path")
REFITTED = (RECIPE, LONG_SEARCH, "path", "path, refitted")
SCRATCH_CIFAR, RANDOM_CIFAR, L2_CIFAR = (
    (CIFAR, (NARROW, 0.25, 0.2), arm, SMALL) for arm in (UNIFORM, "random", "global L2, even order")
)
RECIPES = (
    SMALL_25,
    SMALL_25_WIDTHS,
    SMALL_25_NEW,
    SMALL_25_RANDOM,
    SMALL_10,
    SMALL_10_RANDOM,
    SMALL_10_PATH,
    SMALL_10_L2,
    SMALL_10_GRAM,
    SMALL_10_MEAN,
    LONG_10,
    REFITTED,
)
LASSO_CIFAR = (CIFAR, (NARROW, 0.25, 0.2), SMALL, "group lasso, even order")
CIFARS = (SCRATCH_CIFAR, RANDOM_CIFAR, L2_CIFAR, LASSO_CIFAR)
TICKET_25 = (TICKETS, ("lenet", 0.25), "path ticket, late", "dense")
TICKET_10 = (TICKETS, ("lenet", 0.1), "path ticket, late", "dense")
EARLY, LATE = (10000, ""), (10000, "growth_rounds=1 growth_until=0.3")
GROWN = (GROWTH, EARLY, "grown", "final from scratch")
GROWN_SPLIT = (GROWTH, EARLY, "grown, split", "final from scratch")
SPLIT_WHOLE = (GROWTH, (60000, ""), "final from scratch", "grown, split")
GROWN_WHOLE = (GROWTH, (60000, ""), "final from scratch", "grown")
SPLIT_GROWN = (GROWTH, (60000, ""), "grown, split", "grown")
GROWNS = (GROWN, GROWN_WHOLE, SPLIT_WHOLE)
UNIFORM_GROWN = (GROWTH, EARLY, "grown", "uniform from scratch")
KEPT, ANEW = ((GROWTH, LATE, arm, "final from scratch") for arm in ("grown", "grown, begun anew"))
CLAIMS = {
    "README.md": (
        LATE_L2,
        LATE_LASSO,
        NEW_25,
        NEW_10,
        SMALL_25,
        SMALL_10,
        L2_SMALL_10,
        SCRATCH_CIFAR,
        TICKET_25,
        TICKET_10,
        *GROWNS,
    ),
    "docs/benchmarks/structure.md": (EARLY_LASSO, SCRATCH, NEW_25, NEW_10, NEW_L2, NEW_BN, *RECIPES, *CIFARS),
    "docs/smaller/finetuning.md": (SMALL_25, SMALL_25_WIDTHS, SMALL_10, SCRATCH_CIFAR),
    "docs/smaller/growing.md": (*GROWNS, UNIFORM_GROWN, KEPT, ANEW),
    "docs/benchmarks/growth.md": (*GROWNS, GROWN_SPLIT, SPLIT_GROWN, UNIFORM_GROWN, KEPT, ANEW),
    "model_cards/structure_mnist.md": (EARLY_LASSO, SCRATCH, NEW_25, NEW_10),
}

LORA, SFT, CLEAN = "lora_ranks_banking77", "selection_sft", ", clean pool"
PUBLISHED = ("ifd", "length", "el2n", "top-perplexity")
WHOLE, FULL = ("uniform", 1.0), ("path", 1.0)


def at(one: str, other: str, *sizes: float) -> list[tuple]:
    return [((one, size), (other, size)) for size in sizes or (0.5, 0.25, 0.0625, 0.015625)]


def behind(arm: str, *sizes: float) -> list[tuple]:
    return [(WHOLE, (arm, size)) for size in sizes]


# sentences with places for a difference and its standard error, and the arms, the one that is ahead first
SENTENCES = {
    "docs/benchmarks/lora.md": (
        (
            "the path's adapter is {} ({}) and {} ({}) points above the whole",
            *((("path", b), WHOLE) for b in (0.5, 0.25)),
        ),
        ("at a sixteenth it is {} ({}) behind it, at a sixty-fourth {} ({}).", *behind("path", 0.0625, 0.015625)),
        ("any of the four sizes: {} ({}), {} ({}), {} ({}) and {} ({}) points above it", *at("path", "SVD")),
        (
            "by {} ({}) points at a half, {} ({}) at a quarter, {} ({}) at a sixteenth and, on q and v alone, {} ({})",
            *at("uniform", "path"),
        ),
        ("rank 4 beats rank 16 by {} ({})", (("uniform", 0.25), WHOLE)),
        ("AdaLoRA is ahead of the cuts too, by {0}, {2}, {4} and {6} points", *at("AdaLoRA", "path")),
        ("the whole adapter is {0} points better than the plain one", (FULL, WHOLE)),
        ("above SVD by {} ({}), {} ({}), {} ({}) and {} ({}) points. On", *at("path, strong ridge", "SVD")),
        ("end {0} to {2} points below SVD at a quarter", *at("SVD", "path, columns", 0.25, 0.0625)),
        ("on a plain run {0} points worse", *at("SVD", "effect", 0.015625)),
        ("({0} to +{6} points)", *at("path, early", "random, early")),
    ),
    "docs/data/language.md": (
        ("level with random rows ({} behind, SE {}, three seeds)", ("random", "default")),
        ("exactly the spoilt rows ({} behind, SE {})", ("random", "clean")),
        ("random rows end {} ({}) nats ahead of them in six seeds", ("random", "balanced")),
        ("the default is {} ({}) ahead of them", ("default", "balanced")),
        ("the default loses {} ({}) to random rows", ("random" + CLEAN, "default" + CLEAN)),
        ("is {} ({}) ahead of equal shares", ("default" + CLEAN, "balanced" + CLEAN)),
        (
            "the default is {} ({}) ahead of the rows of the highest IFD, {} ({}) of the longest answers, {} ({}) of "
            "the highest EL2N and {} ({}) of the highest perplexity",
            *(("default", arm) for arm in PUBLISHED),
        ),
        (
            "so are random rows, by {} ({}), {} ({}), {} ({}) and {} ({}): these",
            *(("random", arm) for arm in PUBLISHED),
        ),
    ),
}
# of the same kind in a page: there may be no other
LEFT = re.compile(r"\d*\.\d+ (?:\(|behind, SE )\d*\.\d+")


@cache
def rows(name: str) -> list[dict]:
    text = (FOLDER / "results" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def accuracies(name: str, cell: tuple, arm: str) -> dict[int, float]:
    """Accuracy in percent by seed."""
    found = {}
    for row in rows(name):
        if row["arm"] != arm or row.get("transfer"):
            continue
        if name == STRUCTURE and row["net"] == cell[0] and cell[1] in row.get("budgets", {}):
            found[row["seed"]] = row["budgets"][cell[1]]["after"]
        if (
            name in (RECIPE, CIFAR)
            and (row["net"], row["budget"], row.get("within", 0.2)) == cell
            and "stretch" not in row
        ):
            found[row["seed"]] = row["after"]
        if name == TICKETS and row["net"] == cell[0] and row["budget"] in (cell[1], 1.0):
            found[row["seed"]] = row["accuracy"]
        if name == GROWTH and (row["rows"], row["settings"]) == cell:
            found[row["seed"]] = row["accuracy"]
    return found


def of_arm(arm: str | tuple) -> dict[int, float]:
    """Accuracy in percent of an adapter, or what a language model's loss is below zero, by seed."""
    if isinstance(arm, tuple):
        return {row["seed"]: row["accuracy"] for row in rows(LORA) if (row["arm"], row["budget"]) == arm}
    return {row["seed"]: -row["loss"] for row in rows(SFT) if row["arm"] + CLEAN * (not row["damage"]) == arm}


def paired(mine: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of what the first is ahead by, over the seeds that both have."""
    seeds = sorted(mine.keys() & theirs.keys())
    assert len(seeds) >= 3, seeds
    with importable("rows"):
        return sys.modules["rows"].mean_and_error([mine[seed] - theirs[seed] for seed in seeds])


def ahead(claim: tuple) -> str:
    """By how much, and the standard error, paired over seeds."""
    name, cell, one, other = claim
    mean, error = paired(*(accuracies(name, cell, arm) for arm in (one, other)))
    return f"{mean:+.2f} ({error:.2f})"


def schedule(arm: str) -> str:
    return next((word for word in ("scratch", "early") if word in arm), "late")


@pytest.mark.parametrize("page", CLAIMS)
def test_numbers_of_a_page_are_those_of_the_rows(page):
    told = {}
    for sign, size, error, *others in NUMBER.findall((ROOT / page).read_text(encoding="utf-8")):
        sign, size, error = (sign, size, error) if size else others
        told[f"{size} ({error})"] = sign
    computed = {text[1:]: text[0] for text in map(ahead, CLAIMS[page])}
    assert told.keys() == computed.keys()
    assert all(sign in ("", computed[text]) for text, sign in told.items())


@pytest.mark.parametrize("page", SENTENCES)
def test_differences_in_a_sentence_are_those_of_the_rows(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    for sentence, *claims in SENTENCES[page]:
        found = [number for one, other in claims for number in paired(of_arm(one), of_arm(other))]
        told = [f"{number:.1f}" if page.endswith("lora.md") else f"{number:.3f}".lstrip("0") for number in found]
        assert sentence.format(*told) in text
    left = LEFT.findall(text)
    assert len(left) == sum(sentence.count("{} (") + sentence.count("SE {}") for sentence, *_ in SENTENCES[page])


def test_arms_that_are_compared_have_one_schedule():
    for page, claims in CLAIMS.items():
        for name, _, *arms in claims:
            kinds = {schedule(arm) for arm in arms}
            assert name != STRUCTURE or len(kinds - {"scratch"}) == 1, f"{page}: {arms}"


def test_a_claim_that_is_not_true_is_found():
    text = "ahead by 0.45 (0.17), level (-0.26, SE 0.27) and +1.00 (0.10)"
    found = [[part for part in parts if part] for parts in NUMBER.findall(text)]
    assert found == [["0.45", "0.17"], ["-", "0.26", "0.27"], ["+", "1.00", "0.10"]]
