"""How long the path of a run is: nu and path_scale from the learning rates, and what enters when."""

import math
from collections.abc import Sequence

from hf_effdl.checks import instance, one_of, real_number
from hf_effdl.structure.optim.checks import BASES, STARTS


# Below this the ridge outweighs the loss gradient (of SGD with momentum 0.9) and the net does not train.
# With AdamW, whose direction has entries of about one, only trained weights, of some hundredths, need any.
LEAST_NU = {("sgd", "empty"): 5.0, ("sgd", "dense"): 5.0, ("adamw", "empty"): 0.0, ("adamw", "dense"): 0.02}
PATH_LENGTHS = {"empty": 2.5, "dense": 1.25}
# A ridge that pulls trained weights for longer costs the whole net more than it gives the cut one.
RIDGE_LENGTHS = {"empty": 3.7, "dense": 1.5}
# A longer one tells noise from signal better and holds back what a short run has to learn, a shorter one neither.
WALK_RIDGE_LENGTH = 1.0
# How far above what chance alone reaches the threshold of units that start at zero lies.
WALK_MARGIN = 2.0


def derive_path(
    total_lr: float,
    *,
    lam: float = 1.0,
    kappa: float = 1.0,
    path_length: float | None = None,
    ridge_length: float | None = None,
    base: str = "sgd",
    start: str = "empty",
    nu: float | None = None,
) -> dict[str, float]:
    """nu and path_scale that fit a run of a given length, so that any learning rate travels the path once.

        nu         = kappa max(total_lr / ridge_length, least)  with least 5 for SGD; AdamW: 0, dense start 0.02
        path_scale = path_length lam nu / total_lr              dense start: 1

    and for a dense start also `rise`, see `threshold_rise`.

    Args:
        total_lr: sum of the scheduled learning rates over all steps.
        lam: strength of the penalty.
        kappa: damping.
        path_length: a unit whose norm stays what it was at initialisation enters after `1 / path_length` of the summed
            learning rate; equally, a unit enters if its norm, averaged over the run, passes `1 / path_length` of its
            initial norm. With a dense start, a unit of the mean norm that nothing moves leaves then. Above 1; default:
            2.5, dense start 1.25.
        ridge_length: length of the run in time constants of the ridge that pulls on units outside the support. Runs
            with a summed learning rate below `5 ridge_length` get fewer, and units without signal may enter too
            (`entry_of_noise`). Default: 3.7, dense start 1.5.
        base: of `SplitLBI`. AdamW's direction does not shrink with the gradient, so no ridge of this form outweighs
            it and nu has no least value; only trained weights, of some hundredths, are not to be pulled much faster
            than AdamW can answer.
        start: of `SplitLBI`.
        nu: the coupling, where it is not to be derived.

    Returns:
        `{"nu": ..., "path_scale": ...}` for `SplitLBI`; of a dense start also `"rise"`.

    Raises:
        ValueError: if the path is too short for a unit of unchanged norm to enter, or to leave.

    Example:
        >>> derive_path(total_lr=37.0)
        {'nu': 10.0, 'path_scale': 0.6756756756756757}
    """
    one_of("base", base, BASES), one_of("start", start, STARTS)
    path_length = PATH_LENGTHS[start] if path_length is None else real_number("path_length", path_length)
    total_lr, lam, kappa = real_number("total_lr", total_lr), real_number("lam", lam), real_number("kappa", kappa)
    ridge_length = RIDGE_LENGTHS[start] if ridge_length is None else real_number("ridge_length", ridge_length)
    numbers = {"total_lr": total_lr, "lam": lam, "kappa": kappa, "ridge_length": ridge_length}
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: it must be a positive finite number")
    if not 1 < path_length < math.inf:
        raise ValueError(
            f"path_length={path_length}: a unit whose norm stays what it was would not enter before the run ends "
            "(with a dense start: leave); pass path_length > 1"
        )
    nu = kappa * max(total_lr / ridge_length, LEAST_NU[base, start]) if nu is None else real_number("nu", nu)
    if not 0 < nu < math.inf:
        raise ValueError(f"nu={nu}: it must be a positive finite number")
    if start == "empty":
        return {"nu": nu, "path_scale": path_length * lam * nu / total_lr}
    rise = threshold_rise(total_lr, lam=lam, nu=nu, path_scale=1.0, kappa=kappa, path_length=path_length)
    return {"nu": nu, "path_scale": 1.0, "rise": rise}


def walk_path(
    rates: Sequence[float],
    *,
    lam: float = 1.0,
    kappa: float = 1.0,
    ridge_length: float | None = None,
    nu: float | None = None,
    path_scale: float = 1.0,
) -> dict[str, float]:
    """nu, path_scale and lam for tensors that start at zero, as B of a fresh LoRA adapter does, under AdamW.

    Zero has no norm that a threshold could be in units of. But AdamW's direction has entries of about one whatever the
    size of the gradient, so what chance does is known: if the direction is noise, each entry takes a random walk

        W <- (1 - kappa lr / nu) W + kappa lr xi,      V <- V + path_scale lr W / nu,      xi of variance one,

    and the threshold of a unit is `lam` times twice the root mean square that an entry of V has at the end of it,

        lam_of_optimizer = 2 lam sqrt(E V^2).

    For n equal steps and no ridge `E V^2 = (path_scale / nu)^2 lr^4 n^3 / 3`. A unit's norm is the root mean square of
    its entries (`Group.param_group` of such a group sets that scale). Noise adds up as `n^1.5`, a gradient that keeps
    its sign as `n^2`: in n steps the first reaches half of the threshold, the second `sqrt(3 n) / 4` of it.

    Args:
        rates: the learning rate of every step, `scheduled_rates(args, steps)`.
        lam: strength of the penalty, in those units.
        kappa: damping.
        ridge_length: see `derive_path`; default 1. More decays more of what has not entered, also of what would.
        nu: the coupling, where it is not to be derived.
        path_scale: see `SplitLBI`.

    Returns:
        `{"nu": ..., "path_scale": ..., "lam": ...}` for `SplitLBI(..., base="adamw")`.

    Raises:
        ValueError: for fewer than two steps with a rate, or a number out of range.

    Example:
        >>> {name: round(value, 4) for name, value in walk_path([0.001] * 300).items()}
        {'nu': 0.3, 'path_scale': 1.0, 'lam': 0.0142}
    """
    rates = [real_number("rates", rate) for rate in instance("rates", rates, (list, tuple), "the rate of every step")]
    total, ridge_length = sum(rates), WALK_RIDGE_LENGTH if ridge_length is None else ridge_length
    for name, value in (("the sum of the rates", total), ("ridge_length", ridge_length), ("path_scale", path_scale)):
        if not 0 < real_number(name, value) < math.inf:
            raise ValueError(f"{name}={value}: it must be a positive finite number")
    nu = kappa * total / ridge_length if nu is None else real_number("nu", nu)
    if not 0 < nu < math.inf:
        raise ValueError(f"nu={nu}: it must be a positive finite number")
    weight, both, dual = 0.0, 0.0, 0.0  # E W^2, E W V, E V^2 of one entry
    for rate in rates:
        decay, feed = 1 - kappa * rate / nu, path_scale * rate / nu
        dual += 2 * feed * both + feed**2 * weight
        both = decay * (both + feed * weight)
        weight = decay**2 * weight + (kappa * rate) ** 2
    if not dual > 0:
        raise ValueError(f"{len(rates)} steps are too few for a walk, of two whose rate is not zero; train for more")
    return {"nu": nu, "path_scale": path_scale, "lam": WALK_MARGIN * lam * math.sqrt(dual)}


def threshold_rise(
    total_lr: float, *, lam: float, nu: float, path_scale: float, kappa: float, path_length: float
) -> float:
    """How fast the threshold of a dense start rises, so that a given unit leaves at a given time.

        rise = p / (lam total_lr (1 - exp(-p / path_length))),     p = kappa path_scale total_lr / nu

    where p is how often the run could fill V anew. In units of the mean initial norm, over the share x of the summed
    learning rate, Gamma of a unit whose weights stay at norm w follows `d Gamma / dx = p (w - Gamma) - lam rise
    total_lr`, so

        Gamma(x) = w - (lam rise total_lr / p) (1 - exp(-p x)),

    which for w = 1 is 0 at x = 1 / path_length. A unit never leaves where w stays above `lam rise total_lr / p`: V is
    fed as fast as the threshold rises. A unit whose loss gradient is zero shrinks with Gamma and leaves earlier.

    Args:
        total_lr: sum of the scheduled learning rates.
        lam, nu, path_scale, kappa: of `SplitLBI`.
        path_length: the unit leaves after `1 / path_length` of it.
    """
    filled = kappa * path_scale * total_lr / nu
    return filled / (lam * total_lr * -math.expm1(-filled / path_length))


def exit_share(total_lr: float, *, lam: float, nu: float, path_scale: float, rise: float, kappa: float = 1.0) -> float:
    """Share of the summed learning rate after which a unit of mean, unchanged norm leaves; inf: it never does."""
    filled = kappa * path_scale * total_lr / nu
    left = 1 - filled / (lam * rise * total_lr)
    return -math.log(left) / filled if left > 0 else math.inf


def entry_share(total_lr: float, *, lam: float, nu: float, path_scale: float) -> float:
    """Share of the summed learning rate after which a unit of unchanged norm enters; above 1 it never does."""
    return lam * nu / (path_scale * total_lr)


def entry_of_noise(total_lr: float, *, lam: float, nu: float, path_scale: float, kappa: float = 1.0) -> float:
    """`||V|| / threshold` that a unit whose loss gradient is zero reaches by the end; at 1 or above it enters.

    Such a unit decays as `exp(-kappa t / nu)`, so it reaches `path_scale (1 - exp(-kappa total_lr / nu)) / (kappa
    lam)`.
    """
    return path_scale * (1 - math.exp(-kappa * total_lr / nu)) / (kappa * lam)
