"""How long the path of a run is: nu and path_scale from the learning rates, and what enters when."""

import math

from hf_effdl.checks import one_of, real_number


# Below this the ridge outweighs the loss gradient (of SGD with momentum 0.9) and the net does not train.
LEAST_NU = 5.0
# The same for AdamW and trained weights: its direction has entries of about one, and trained weights entries of some
# hundredths.
LEAST_NU_OF_TRAINED = 0.02
PATH_LENGTHS = {"empty": 2.5, "dense": 1.25}


def derive_path(
    total_lr: float,
    *,
    lam: float = 1.0,
    kappa: float = 1.0,
    path_length: float | None = None,
    ridge_length: float = 3.7,
    base: str = "sgd",
    start: str = "empty",
    nu: float | None = None,
) -> dict[str, float]:
    """nu and path_scale that fit a run of a given length, so that any learning rate travels the path once.

        nu         = kappa max(total_lr / ridge_length, 5)     (without the 5 for AdamW)
        path_scale = path_length lam nu / total_lr

    Args:
        total_lr: sum of the scheduled learning rates over all steps.
        lam: strength of the penalty.
        kappa: damping.
        path_length: a unit whose norm stays what it was at initialisation enters after `1 / path_length` of the summed
            learning rate; equally, a unit enters if its norm, averaged over the run, passes `1 / path_length` of its
            initial norm. Above 1.
        ridge_length: length of the run in time constants of the ridge that pulls on units outside the support. Runs
            with a summed learning rate below `5 ridge_length` get fewer, and units without signal may enter too
            (`entry_of_noise`).
        base: of `SplitLBI`. AdamW's direction does not shrink with the gradient, so no ridge of this form outweighs
            it and nu has no least value.

    Returns:
        `{"nu": ..., "path_scale": ...}` for `SplitLBI`.

    Raises:
        ValueError: if the path is too short for a unit of unchanged norm to enter.

    Example:
        >>> derive_path(total_lr=37.0)
        {'nu': 10.0, 'path_scale': 0.6756756756756757}
    """
    one_of("base", base, ("sgd", "adamw"))
    total_lr, lam, kappa = real_number("total_lr", total_lr), real_number("lam", lam), real_number("kappa", kappa)
    path_length, ridge_length = real_number("path_length", path_length), real_number("ridge_length", ridge_length)
    if not total_lr > 0 or not ridge_length > 0:
        raise ValueError(f"total_lr={total_lr} and ridge_length={ridge_length} must be positive")
    if not path_length > 1:
        raise ValueError(
            f"path_length={path_length}: a unit whose norm stays what it was would not enter before the run ends; "
            "pass path_length > 1"
        )
    nu = kappa * max(total_lr / ridge_length, LEAST_NU if base == "sgd" else 0.0)
    return {"nu": nu, "path_scale": path_length * lam * nu / total_lr}


def entry_share(total_lr: float, *, lam: float, nu: float, path_scale: float) -> float:
    """Share of the summed learning rate after which a unit of unchanged norm enters; above 1 it never does."""
    return lam * nu / (path_scale * total_lr)


def entry_of_noise(total_lr: float, *, lam: float, nu: float, path_scale: float, kappa: float = 1.0) -> float:
    """`||V|| / threshold` that a unit whose loss gradient is zero reaches by the end; at 1 or above it enters.

    Such a unit decays as `exp(-kappa t / nu)`, so it reaches `path_scale (1 - exp(-kappa total_lr / nu)) / (kappa
    lam)`.
    """
    return path_scale * (1 - math.exp(-kappa * total_lr / nu)) / (kappa * lam)
