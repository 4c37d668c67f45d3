"""SplitLBI (arXiv 2007.02010, 1905.09449) against worked numbers, naive references and the theory of the iteration."""

import copy
import io
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_effdl.structure.optim.prox import shrinkage, soft_threshold, unit_norm
from hf_effdl.structure.optim.split_lbi import SplitLBI


NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameter(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def exactly_equal(a, b):
    """Same dtypes and bits, through nested dicts and lists."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(exactly_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(exactly_equal, a, b))
    return type(a) is type(b) and a == b


def snapshot(opt):
    params = [p.detach() for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy([opt.state_dict()["state"], params])


# ---- worked numbers


def printed(got, *values):
    """Equal to the ten decimals that are given."""
    torch.testing.assert_close(got, tensor(*values), rtol=0, atol=5.1e-11)


def test_entrywise_path_has_the_worked_numbers():
    target, entered = tensor(1.0, 0.5, -0.25, 0.05), {}
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = SplitLBI([{"params": [w], "penalty": "l1"}], lr=0.1, kappa=1, nu=1, lam=1, momentum=0, lam_scale="none")
    for step in range(1, 411):
        w.grad = w.detach() - target
        opt.step()
        entered |= {i: step for i in opt.gamma(w).nonzero().flatten().tolist() if i not in entered}
        if step == 25:
            printed(w.detach(), 0.4981110534, 0.2490555267, -0.1245277634, 0.0249055527)
            printed(opt.dual(w), 1.0009444733, 0.5004722366, -0.2502361183, 0.0500472237)
            printed(opt.gamma(w), 0.0009444733, 0, 0, 0)
        elif step == 50:
            printed(w.detach(), 0.7788897852, 0.2684447659, -0.1249982159, 0.0249996432)
            printed(opt.gamma(w), 0.6421415115, 0.1044081319, 0, 0)
    assert list(entered.values()) == [25, 45, 85, 406]


# ---- the four lines of the paper, written naively


def rows(t, count):
    return [[(t, (c,), 1.0)] for c in range(count)]


def blocks(t, count, block):
    return [[(t, (slice(None), slice(c * block, (c + 1) * block)), 1.0)] for c in range(count)]


# name: shapes, param group, and the units as lists of (tensor, index, scale), None for single entries
LIFTS = {
    "entries": ([(5, 7), (3, 2, 2)], {"penalty": "l1"}, None),
    "conv filters": ([(6, 3, 2, 2)], {}, rows(0, 6)),
    "linear column blocks": ([(5, 12)], {"axis": 1, "block": 3}, blocks(0, 4, 3)),
    "batch norm and conv input": (
        [(4,), (6, 4, 3, 3)],
        {"axis": [0, 1], "scale": [1.7, 0.4]},
        [[(0, (c,), 1.7), (1, (slice(None), c), 0.4)] for c in range(4)],
    ),
}


def naive_path(starts, units, move, steps, *, kappa, lr, nu, path_scale, lam, lam_scale):
    """The iteration, unit by unit; `units=None` is the l1 penalty. Returns W, V and Gamma after every step.

    `move(step, old W)` is the new W after the base's step alone.
    """
    w = [start.clone() for start in starts]
    v, gamma = ([torch.zeros_like(start) for start in starts] for _ in range(2))

    def norm(tensors, unit):
        return math.sqrt(sum(scale**2 * float((tensors[t][index] ** 2).sum()) for t, index, scale in unit))

    if units is None:
        sizes = [math.sqrt(float((start**2).sum()) / start.numel()) for start in starts]
    else:
        sizes = [norm(starts, unit) for unit in units]
    thresholds = [lam * size if lam_scale == "init" else lam for size in sizes]
    path = []
    for step in range(steps):
        for t, moved in enumerate(move(step, w)):
            coupling = (w[t] - gamma[t]) / nu
            w[t], v[t] = moved - kappa * lr * coupling, v[t] + path_scale * lr * coupling
        gamma = [torch.zeros_like(x) for x in v]
        if units is None:
            for t, threshold in enumerate(thresholds):
                gamma[t] = kappa * (torch.clamp(v[t] - threshold, min=0) - torch.clamp(-v[t] - threshold, min=0))
        else:
            for unit, threshold in zip(units, thresholds, strict=True):
                size = norm(v, unit)
                for t, index, _ in unit:
                    gamma[t][index] = kappa * v[t][index] * (max(0.0, 1 - threshold / size) if size else 0.0)
        path.append((w, v, gamma))
        w, v, gamma = ([x.clone() for x in xs] for xs in (w, v, gamma))
    return path


BASES = [
    {"momentum": 0.0},
    {"lam_scale": "none"},
    {"weight_decay": 0.1},
    {"nesterov": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"base": "adamw"},
    {"base": "adamw", "weight_decay": 0.1, "decoupled_weight_decay": False},
]


@pytest.mark.parametrize("hyper", BASES)
@pytest.mark.parametrize("lift", LIFTS)
def test_a_step_is_that_of_the_base_and_beside_it_the_four_line_iteration(lift, hyper):
    """W takes the base's step from the old W, and the coupling's; neither sees the other."""
    shapes, param_group, units = LIFTS[lift]
    path = {"lr": 0.05, "kappa": 1.5, "nu": 0.7, "path_scale": 1.3, "lam": 0.8}
    params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    opt = SplitLBI([{"params": params, "penalty": "group", **param_group}], **path, **hyper)
    starts = [p.detach().clone() for p in params]
    # the base alone, one fresh tensor moved from the old W at every step
    moved = [torch.nn.Parameter(w.clone()) for w in starts]
    base = SplitLBI([{"params": moved}], **path, **hyper)
    grads = []

    def move(step, w):
        grads.append([0.4 * (x - 2 * parameter(*x.shape, seed=10 + t).detach()) for t, x in enumerate(w)])
        for p, x, grad in zip(moved, w, grads[-1], strict=True):
            p.data, p.grad = x.clone(), grad.clone()
        base.step()
        return [p.detach().clone() for p in moved]

    inside = []
    for step, expected in enumerate(
        naive_path(starts, units, move, 40, **path, lam_scale=hyper.get("lam_scale", "init"))
    ):
        for p, grad in zip(params, grads[step], strict=True):
            p.grad = grad
        opt.step()
        for read, values in zip((torch.Tensor.detach, opt.dual, opt.gamma), expected, strict=True):
            for p, value in zip(params, values, strict=True):
                torch.testing.assert_close(read(p), value, rtol=0, atol=1e-12)
        inside.append(sum(int((opt.gamma(p) != 0).sum()) for p in params))
    assert inside[0] == 0 < inside[-1], "a path that starts empty and fills up takes both branches of the prox"


SGD, ADAMW, F64 = torch.optim.SGD, torch.optim.AdamW, torch.float64
AS_IN_TORCH = [
    ({"momentum": m, "weight_decay": decay}, SGD, {"momentum": m}, dtype)
    for m in (0.0, 0.9)
    for decay in (0.0, 0.05)
    for dtype in (torch.float32, F64, torch.bfloat16)
]
AS_IN_TORCH += [
    ({"nesterov": True, "weight_decay": 0.05}, SGD, {"momentum": 0.9, "nesterov": True}, F64),
    ({"base": "adamw", "weight_decay": 0.05}, ADAMW, {}, F64),
    ({"base": "adamw", "betas": (0.8, 0.9), "eps": 1e-3}, ADAMW, {"betas": (0.8, 0.9), "eps": 1e-3}, F64),
    ({"base": "adamw", "weight_decay": 0.05, "decoupled_weight_decay": False}, torch.optim.Adam, {}, F64),
]


@pytest.mark.parametrize("hyper,theirs,kwargs,dtype", AS_IN_TORCH)
def test_a_parameter_that_is_not_lifted_takes_the_step_of_torch_at_kappa_lr(hyper, theirs, kwargs, dtype):
    mine, other, lifted = params = [parameter(4, 3, dtype=dtype) for _ in range(3)]
    opt = SplitLBI([{"params": [mine]}, {"params": [lifted], "penalty": "group"}], lr=0.05, kappa=3.0, **hyper)
    reference = theirs([other], lr=3.0 * 0.05, weight_decay=hyper.get("weight_decay", 0.0), **kwargs)
    for p in params:
        p.grad = torch.zeros_like(p)
    for step in range(20):
        for p in params:  # in place, as a backward after zero_grad(set_to_none=False) does
            p.grad.copy_(parameter(4, 3, seed=step, dtype=dtype))
        opt.step()
        reference.step()
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13 * (theirs is not SGD))
    assert not torch.equal(mine, lifted)


def test_decoupled_weight_decay_of_sgd_is_a_step_of_its_own():
    p = parameter(4, 3)
    opt = SplitLBI([p], lr=0.1, kappa=2.0, weight_decay=0.3, decoupled_weight_decay=True)
    expected = p.detach() * (1 - 2.0 * 0.1 * 0.3) - 0.2
    p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("hyper", [{}, {"base": "adamw"}, {"weight_decay": 0.1}])
@pytest.mark.parametrize(
    "shape,axis,block", [((40, 30), 0, 1), ((40, 30), 1, 5), ((30, 8, 3, 3), 1, 1), ((500,), 0, 1)]
)
def test_working_on_a_few_rows_at_a_time_changes_nothing(monkeypatch, shape, axis, block, hyper):
    results = []
    for entries in (1 << 30, 100):
        monkeypatch.setattr("hf_effdl.structure.optim.prox.CACHED", entries)
        p, head = parameter(*shape), parameter(*shape, seed=1)
        opt = SplitLBI(
            [{"params": [p], "penalty": "group", "axis": axis, "block": block}, {"params": [head], "penalty": "l1"}],
            lr=0.1,
            nu=1.0,
            lam=0.5,
            **hyper,
        )
        for step in range(15):
            p.grad, head.grad = parameter(*shape, seed=2 + step).detach(), parameter(*shape, seed=50 + step).detach()
            opt.step()
        results.append([p.detach(), head.detach(), opt.gamma(p), opt.gamma(head), opt.state[p]["entered"].double()])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-13)
    assert results[0][2].any() and results[0][3].any()


# ---- the Lyapunov function, and where the step size stops being safe

LIP = 2.8


def quadratic(seed=0):
    """`0.5 (w - b)^T A (w - b)` in 12 dimensions, the largest eigenvalue of A being LIP."""
    basis, _ = torch.linalg.qr(parameter(12, 12, seed=seed).detach())
    a = basis @ torch.diag(torch.linspace(0.3, LIP, 12, dtype=torch.float64)) @ basis.T
    return a, 2 * parameter(12, seed=seed + 1).detach()


def descend(alpha, kappa, nu, penalty, steps):
    """Yield (W, V, Gamma) of SplitLBI on the quadratic, from the start on; units are 4 rows of 3."""
    a, b = quadratic()
    w = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    opt = SplitLBI([{"params": [w], "penalty": penalty}], alpha, kappa, nu, momentum=0, lam_scale="none")
    for _ in range(steps):
        yield w.detach().clone(), opt.dual(w), opt.gamma(w)
        w.grad = (a @ (w.detach().flatten() - b)).view(4, 3)
        opt.step()


def largest_eigenvalue(nu):
    """Of the Hessian of the loss plus `||W - Gamma||^2 / (2 nu)`; the coupling alone has 2 / nu."""
    return (LIP + 2 / nu + math.sqrt(LIP**2 + 4 / nu**2)) / 2


@pytest.mark.parametrize("penalty", ["l1", "group"])
@pytest.mark.parametrize("kappa", [1.0, 3.0])
@pytest.mark.parametrize("nu", [0.1, 1.0, 10.0])
def test_the_lyapunov_function_descends_up_to_the_safe_step_size(nu, kappa, penalty):
    a, b = quadratic()
    bound = largest_eigenvalue(nu)
    alpha = 0.99 * 2 / (kappa * bound)
    rho = 1 / kappa - alpha * bound / 2
    assert rho > 0

    def augmented(w, gamma):
        rest = w.flatten() - b
        return float(rest @ a @ rest / 2 + (w - gamma).square().sum() / (2 * nu))

    def omega(gamma):
        return float(gamma.abs().sum() if penalty == "l1" else gamma.norm(dim=1).sum())

    old = None
    for w, v, gamma in descend(alpha, kappa, nu, penalty, 3000):
        subgradient, value = v - gamma / kappa, augmented(w, gamma)
        bregman, moved = 0.0, 0.0
        if old is not None:
            old_w, old_gamma, old_subgradient, old_value, old_lyapunov = old
            bregman = omega(gamma) - omega(old_gamma) - float((old_subgradient * (gamma - old_gamma)).sum())
            moved = float((w - old_w).square().sum() + (gamma - old_gamma).square().sum())
            assert bregman >= -1e-12
            assert value <= old_value + 1e-12
            assert alpha * value + bregman <= old_lyapunov - rho * moved + 1e-12
        old = w, gamma, subgradient, value, alpha * value + bregman
    # the limit is dense: W and Gamma meet at the minimiser of the loss
    torch.testing.assert_close(w, gamma, rtol=0, atol=1e-10)
    torch.testing.assert_close(w.flatten(), b, rtol=0, atol=1e-10)


# ---- the prox

threshold_values = st.floats(0.01, 3)
few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("penalty", ["l1", "group"])
@given(v=st.lists(st.floats(-5, 5), min_size=1, max_size=5), lam=threshold_values)
@few
def test_a_shrunken_vector_minimises_the_penalised_problem(penalty, v, lam):
    """0 lies in the subgradient of `0.5 ||x - v||^2 + lam penalty(x)`."""
    v = tensor(*v)
    if penalty == "l1":
        x = soft_threshold(v, tensor(lam)[0])
        size, rest = x.abs(), (v - x).abs()
    else:
        norm = unit_norm([v[None]], [0], [1], [1.0])
        x = shrinkage(norm, torch.full_like(norm, lam))[0] * v
        size, rest = x.norm(), (v - x).norm()
    assert (rest <= lam + 1e-12).all() and (rest - lam).abs()[size > 0].lt(1e-12).all()
    assert (x * (v - x) >= -1e-12).all()  # the rest points the same way


@given(st.lists(st.floats(0, 4), min_size=1, max_size=6), threshold_values)
@few
def test_shrinkage_is_a_factor_from_zero_to_one_that_is_zero_up_to_the_threshold(norms, lam):
    norm = tensor(*norms, 0.0, lam)
    factor = shrinkage(norm, torch.full_like(norm, lam))
    assert torch.equal(factor == 0, norm <= lam)
    assert ((0 <= factor) & (factor < 1)).all()


def test_a_unit_of_zero_norm_shrinks_to_zero_without_nan():
    # 0 / 0 where the threshold is zero too
    assert shrinkage(tensor(0.0, 0.0), tensor(1.0, 0.0)).tolist() == [0.0, 0.0]
    assert soft_threshold(tensor(0.0), tensor(0.0)).tolist() == [0.0]


@pytest.mark.parametrize("axis,block,shape", [(0, 1, (6,)), (0, 2, (6, 3)), (1, 3, (2, 6, 2, 2)), (2, 1, (2, 3, 4))])
def test_unit_norm_is_the_norm_over_all_entries_of_the_unit(axis, block, shape):
    x = parameter(*shape).detach()
    chunks = x.split(block, dim=axis)
    expected = torch.stack([(2.5 * chunk).flatten().norm() for chunk in chunks])
    torch.testing.assert_close(unit_norm([x], [axis], [block], [2.5]), expected, rtol=0, atol=1e-12)


# ---- state


def mixed(dtype=torch.float32, seed=0, **hyper):
    """One optimizer with a group over two tensors, an l1 group and a group that is not lifted, and its parameters."""
    shapes = [(4,), (6, 4, 3, 3), (5, 7), (3, 2)]
    bn, conv, linear, plain = params = [parameter(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]
    groups = [
        {"params": [bn, conv], "penalty": "group", "axis": [0, 1], "scale": [1.7, 0.4], "name": "conv1"},
        {"params": [linear], "penalty": "l1", "name": "head"},
        {"params": [plain]},
    ]
    return params, SplitLBI(groups, **{"lr": 0.1, "nu": 1.0, **hyper})


def run(params, opt, steps, seed=100):
    """Steps on a noisy quadratic."""
    for step in range(steps):
        for i, p in enumerate(params):
            noise, target = parameter(*p.shape, seed=seed + 10 * step + i), 2 * parameter(*p.shape, seed=30 + i)
            p.grad = (0.1 * noise + 0.5 * (p - target)).detach().to(p.dtype)
        opt.step()


def test_state_is_created_by_the_first_step():
    params, opt = mixed(lam=0.3)
    opt.load_state_dict(opt.state_dict())  # what accelerate does when it wraps an optimizer
    opt.gamma(params[0]), opt.dual(params[2])
    assert len(opt.state) == 0
    with torch.no_grad():
        params[1].mul_(2)  # weights that are loaded after the optimizer is made set the thresholds
    starts = [p.detach().clone() for p in params]
    run(params, opt, 1)
    expected = 0.3 * ((1.7 * starts[0]) ** 2 + (0.4 * starts[1]).square().sum((0, 2, 3))).sqrt()
    torch.testing.assert_close(opt.state[params[0]]["threshold"], expected)
    torch.testing.assert_close(opt.state[params[2]]["threshold"], 0.3 * starts[2].square().mean().sqrt())


def test_state_dict_holds_tensors_and_plain_values_only():
    params, opt = mixed()
    run(params, opt, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert exactly_equal(torch.load(file, weights_only=True), opt.state_dict())


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor])
def test_settings_of_numpy_are_kept_as_pythons_own_and_read_back(kind):
    names = ("lr", "kappa", "nu", "momentum", "weight_decay", "lam", "path_scale", "eps")
    settings = {name: kind(0.5) for name in names} | {"betas": (kind(0.5), kind(0.75))}
    weight = torch.nn.Parameter(torch.ones(4, 2))
    group = {
        "params": [weight],
        "penalty": "group",
        "axis": [np.int64(0)],
        "block": [np.int64(2)],
        "scale": [kind(0.5)],
    }
    opt = SplitLBI([group], **settings)
    weight.grad = torch.ones_like(weight)
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert exactly_equal(saved, opt.state_dict())
    assert all(saved["param_groups"][0][name] == 0.5 for name in names) and saved["param_groups"][0]["units"] == 2


@pytest.mark.parametrize("hyper", [{}, {"base": "adamw", "nu": 0.4}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_reloaded_optimizer_continues_bit_for_bit(dtype, hyper):
    params, opt = mixed(dtype, **hyper)
    run(params, opt, 12)
    saved = copy.deepcopy(opt.state_dict())
    others, resumed = mixed(dtype, seed=50, **hyper)
    run(others, resumed, 2)  # what it has done before must not matter
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    resumed.load_state_dict(saved)
    assert exactly_equal(resumed.state_dict(), saved)
    assert set((saved["state"][0]["entered"] > 0).tolist()) == {True, False}
    wide = torch.promote_types(dtype, torch.float32)
    for p in others[:3]:
        assert resumed.state[p]["dual"].dtype == wide
    unit = resumed.state[others[0]]
    assert unit["threshold"].dtype == unit["norm"].dtype == wide
    assert unit["entered"].dtype == unit["left"].dtype == unit["step"].dtype == torch.int64

    run(params, opt, 12, seed=700)
    run(others, resumed, 12, seed=700)
    assert exactly_equal(snapshot(opt), snapshot(resumed))
    # the loaded state is a copy: what was saved has not moved with the run
    assert not exactly_equal(resumed.state_dict()["state"], saved["state"])


def test_a_checkpoint_brings_its_own_numbers():
    params, opt = mixed(lam=0.3)
    run(params, opt, 3)
    others, resumed = mixed(lam=1.0)
    run(others, resumed, 3)
    resumed.load_state_dict(opt.state_dict())
    run(others, resumed, 2)  # no group counts as edited
    assert all(group["lam"] == 0.3 for group in resumed.param_groups)


@pytest.mark.parametrize(
    "lifted,sizes",
    [
        ({}, [360]),
        ({"penalty": "l1"}, [1, 1, 360, 360]),
        ({"penalty": "group"}, [1, 8, 8, 8, 8, 360, 360]),
        ({"penalty": "group", "base": "adamw"}, [1, 1, 8, 8, 8, 8, 360, 360, 360]),
    ],
)
def test_state_is_one_tensor_larger_than_that_of_the_base(lifted, sizes):
    weight = parameter(8, 5, 3, 3, dtype=torch.float32)
    opt = SplitLBI([{"params": [weight], **lifted}], lr=0.1)
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert sorted(value.numel() for value in opt.state[weight].values()) == sizes


@pytest.mark.parametrize("hyper", [{}, {"base": "adamw", "weight_decay": 0.1, "nu": 0.4}, {"fused": True}])
def test_a_learning_rate_of_zero_moves_nothing(hyper, request):
    if "fused" in hyper:
        request.getfixturevalue("compiler")
    params, opt = mixed(**hyper)
    run(params, opt, 12)
    for group in opt.param_groups:
        group["lr"] = 0.0

    def everything():
        lifted = [(opt.dual(p), opt.gamma(p)) for p in params[:3]]
        record = {name: opt.state[params[0]][name] for name in ("entered", "left", "norm", "threshold")}
        return copy.deepcopy([[p.detach() for p in params], lifted, record])

    before = everything()
    assert set((before[2]["entered"] > 0).tolist()) == {True, False}
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert exactly_equal(everything(), before)
    run(params, opt, 3)  # gradients that are not zero
    assert exactly_equal(everything(), before)


# ---- training loops


def test_a_step_that_the_grad_scaler_skips_changes_nothing():
    params, opt = mixed()
    run(params, opt, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, step = snapshot(opt), int(opt.state[params[0]]["step"])
    for grad, taken in ((INF, False), (0.5, True)):
        loss = sum((grad * p).sum() for p in params)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        assert exactly_equal(snapshot(opt), before) == (not taken)
        assert int(opt.state[params[0]]["step"]) == step + taken
    assert torch.equal(params[0].grad, torch.full((4,), 0.5))  # the scale halved after the skip, then divided out


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1), (2,)])
@pytest.mark.parametrize("first", [0, 4])
def test_parameters_without_gradient_wait_and_go_on_later(without, first):
    params, opt = mixed()
    run(params, opt, first)
    before = [(p.detach().clone(), opt.dual(p)) for p in params[:3]]
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = None if i in without else torch.ones_like(p)
        opt.step()
    for i, p in enumerate(params[:3]):
        same = exactly_equal([p.detach(), opt.dual(p)], list(before[i]))
        assert same == (i in without)
    waited = [opt.dual(params[i]) for i in without]
    run(params, opt, 10)
    assert not any(torch.equal(opt.dual(params[i]), dual) for i, dual in zip(without, waited, strict=True))
    norm = unit_norm([opt.dual(p) for p in params[:2]], [0, 1], [1, 1], [1.7, 0.4])
    torch.testing.assert_close(opt.state[params[0]]["norm"], norm)


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned():
    w = parameter(3, 2)
    opt = SplitLBI([{"params": [w], "penalty": "group"}], lr=0.1)
    calls = []

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert opt.step(closure) is calls[0]
    assert len(calls) == 1


# ---- the record of who entered and left


@pytest.mark.parametrize("fused", [False, True])
def test_record_keeps_the_first_entry_and_the_last_exit(fused, request):
    if fused:
        request.getfixturevalue("compiler")
    w = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    hyper = {"lr": 0.1, "nu": 1.0, "momentum": 0, "lam": 1.0, "lam_scale": "none", "fused": fused}
    opt = SplitLBI([{"params": [w], "penalty": "group"}], **hyper)
    inside = [False]
    for step in range(1, 200):
        # unit 0 is pulled to +3, then to -3: V crosses zero and the unit enters a second time;
        # unit 1 is pulled up only; unit 2 has no pull and V of what only decays stays below the threshold
        w.grad = w.detach() - tensor(3.0 if step < 30 else -3.0, 3.0, 0.0)[:, None]
        opt.step()
        inside.append(bool(opt.gamma(w)[0].any()))
        turns = [k for k in range(1, step + 1) if inside[k] != inside[k - 1]]
        unit = opt.state[w]
        record = [int(unit["step"]), int(unit["entered"][0]), int(unit["left"][0])]
        assert record == [step, turns[0] if turns else -1, turns[-1] if turns and not inside[-1] else -1]
    assert len(turns) == 3, "the unit should enter, leave and enter again"
    assert unit["entered"].tolist() == [turns[0], turns[0], -1] and unit["left"].tolist() == [-1, -1, -1]


# ---- gamma and dual


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gamma_and_dual_have_the_shape_of_the_parameter_and_at_least_float32(dtype):
    params, opt = mixed(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for p in params[:3]:
        for read in (opt.gamma, opt.dual):
            assert exactly_equal(read(p), torch.zeros(p.shape, dtype=wide))
    run(params, opt, 5)
    for p in params[:3]:
        assert p.dtype == dtype
        for read in (opt.gamma, opt.dual):
            assert (read(p).shape, read(p).dtype, read(p).requires_grad) == (p.shape, wide, False)


def test_dual_is_a_copy():
    params, opt = mixed()
    run(params, opt, 2)
    before = snapshot(opt)
    opt.dual(params[1]).add_(1)
    opt.gamma(params[1]).add_(1)
    assert exactly_equal(snapshot(opt), before)


@pytest.mark.parametrize("read", ["gamma", "dual"])
def test_gamma_and_dual_refuse_what_is_not_lifted(read):
    params, opt = mixed()
    with pytest.raises(ValueError, match="not lifted .*penalty=None"):
        getattr(opt, read)(params[3])
    for foreign in (parameter(4), params[0].detach()):
        with pytest.raises(ValueError, match="not a parameter of this optimizer"):
            getattr(opt, read)(foreign)


# ---- bad input


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize("name", ["lr", "kappa", "nu", "lam", "path_scale"])
def test_numbers_that_are_not_positive_and_finite_are_refused(name, value):
    p = parameter(4, 3)
    with pytest.raises(ValueError, match=rf"^{name}="):
        SplitLBI([p], **{"lr": 0.1, name: value})
    with pytest.raises(ValueError, match=rf"^{name}=.* in group 'conv1'"):
        SplitLBI([{"params": [p], "penalty": "group", "name": "conv1", name: value}], lr=0.1)


G = {"params": [parameter(4, 6)], "penalty": "group", "name": "g"}
COMPLEX, WHOLE = (torch.ones(4, 3, dtype=dtype) for dtype in (torch.complex64, torch.int64))


@pytest.mark.parametrize(
    "group,match",
    [
        *(({"momentum": value}, f"momentum={value}") for value in (-0.1, 1.0, NAN)),
        *(({"weight_decay": value}, f"weight_decay={value}") for value in (-0.1, NAN)),
        ({"lam_scale": "rms"}, "lam_scale='rms' .*'init', 'none'"),
        ({"base": "adam"}, "base='adam' .*'sgd', 'adamw'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True .*momentum=0.0"),
        ({"nesterov": True, "base": "adamw"}, "nesterov=True .*base='adamw'"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\)"),
        *(({"eps": value}, f"eps={value}") for value in (-1.0, INF)),
        ({"penalty": "l2"}, "penalty='l2' .*'group'"),
        ({"axis": 2}, "axis=2 of group 'g' .*(4, 6)"),
        ({"axis": -3}, "axis=-3 of group 'g'"),
        *(({"block": value}, f"block={value} of group 'g'") for value in (0, 3)),
        ({"axis": 1, "block": 4}, "block=4 of group 'g' does not divide axis 1"),
        ({"axis": [0, 1]}, r"1 tensors but 2 values in axis=\[0, 1\]"),
        ({"scale": [1.0, 2.0]}, "1 tensors but 2 values in scale="),
        *(({"scale": value}, f"scale={value} of group 'g'") for value in (0.0, NAN)),
        ({"units": 5}, "units=5"),
        ({"params": [parameter(4, 6), parameter(5)]}, r"group 'g' have \[4, 5\] units"),
        ({"params": []}, "group 'g' .*no parameters"),
        ({"params": {parameter(4, 3)}}, "ordered"),
        ({"params": G["params"] * 2}, "group 'g' .* twice"),
        ({"params": [("weight", *G["params"]), ("tied", *G["params"])]}, "group 'g' .* twice"),
        ({"params": [COMPLEX]}, "group 'g' lifts a torch.complex64"),
        ({"params": [WHOLE]}, "group 'g' lifts a torch.int64"),
        ({"params": [WHOLE], "penalty": "l1"}, "group 'g' lifts a torch.int64"),
        ({"params": [COMPLEX], "penalty": None}, "group 'g' holds a torch.complex64 .*view_as_real"),
        (
            {"params": [parameter(4, 3), torch.ones(4, 2, device="meta")]},
            "group 'g' are on cpu and meta: .*one device",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(group, match):
    with pytest.raises((ValueError, TypeError), match=match):
        SplitLBI([G | group], lr=0.1)


def test_a_tensor_is_lifted_by_one_group():
    with pytest.raises(ValueError, match=r"\(4, 6\) is lifted by group 'g' .* in group 'h'"):
        SplitLBI([G, G | {"name": "h"}], lr=0.1)


def test_a_group_that_is_refused_is_not_kept():
    opt = SplitLBI([parameter(4, 3)], lr=0.1)
    with pytest.raises(ValueError, match="axis=5"):
        opt.add_param_group({"params": [parameter(4, 3)], "penalty": "group", "axis": 5})
    assert len(opt.param_groups) == 1


def test_a_unit_that_starts_at_zero_needs_lam_scale_none():
    p = parameter(4, 3)
    with torch.no_grad():
        p[1] = 0
    SplitLBI([{"params": [p], "penalty": "l1"}], lr=0.1)
    SplitLBI([{"params": [p], "penalty": "group"}], lr=0.1, lam_scale="none")
    with pytest.raises(ValueError, match="1 units of group 'g' .*lam_scale='none'"):
        SplitLBI([{"params": [p], "penalty": "group", "name": "g"}], lr=0.1)
    with pytest.raises(ValueError, match="group 'g' .*lam_scale='none'"):
        SplitLBI([{"params": [p, torch.nn.Parameter(torch.zeros(3))], "penalty": "l1", "name": "g"}], lr=0.1)


def test_sparse_gradients_are_refused_by_name_before_anything_moves():
    table = torch.nn.Embedding(6, 3, sparse=True)
    other = parameter(3, 2, dtype=torch.float32)
    opt = SplitLBI([{"params": [other], "penalty": "group"}, {"params": [table.weight], "name": "words"}], lr=0.1)
    before = snapshot(opt)
    other.grad = torch.ones_like(other)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="gradient of words, tensor 0 is sparse .*sparse=False"):
        opt.step()
    assert exactly_equal(snapshot(opt), before)


EDITS = {"axis": [1, 1], "scale": [1.0, 1.0], "block": [1, 2], "penalty": None, "lam": 2.0, "lam_scale": "none"}
EDITS |= {"units": 5, "base": "adamw", "name": "other", "params": None}


@pytest.mark.parametrize("key,value", EDITS.items())
def test_a_group_that_is_edited_in_what_v_rests_on_is_refused(key, value):
    params, opt = mixed()
    run(params, opt, 3)
    group = opt.param_groups[0]
    old = group[key]
    group[key] = value if key != "params" else [params[0], parameter(6, 4, 3, 3, dtype=torch.float32)]
    before = copy.deepcopy([list(opt.state.values()), params])
    with pytest.raises(ValueError, match=f"'{key}' of param group .* was changed between two steps.*new SplitLBI"):
        opt.step()
    assert str(before) == str([list(opt.state.values()), params])
    group[key] = old
    run(params, opt, 1)  # put back, it goes on


@pytest.mark.parametrize("key", ["lr", "nu", "kappa", "path_scale", "momentum", "weight_decay", "nesterov", "fused"])
def test_numbers_may_change_between_steps_within_their_range(key, request):
    """Nesterov's momentum may not be taken away."""
    if key == "fused":
        request.getfixturevalue("compiler")
    wrong = ("momentum", 0.0, "nesterov=True in group 'conv1' .*momentum=0.0")
    name, value, message = wrong if key in ("nesterov", "fused") else (key, NAN, f"{key}=nan in group 'conv1'")
    params, opt = mixed(nesterov=name != key, fused=key == "fused")
    run(params, opt, 2)
    opt.param_groups[0][name] = 0.5
    run(params, opt, 2)
    opt.param_groups[0][name] = value
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert exactly_equal(snapshot(opt), before)


def test_groups_are_added_by_the_method_and_never_taken_away():
    params, opt = mixed()
    run(params, opt, 2)
    more = parameter(3, 3, dtype=torch.float32)
    opt.add_param_group({"params": [more], "penalty": "group", "name": "late"})
    run([*params, more], opt, 2)
    assert int(opt.state[more]["step"]) == 2
    group = opt.param_groups.pop()
    with pytest.raises(ValueError, match="3 param groups.*|there were 4 param groups .* 3; .*add_param_group"):
        opt.step()
    opt.param_groups.append(group)
    run([*params, more], opt, 1)


def test_a_copied_optimizer_goes_on_as_the_original_would():
    params, opt = mixed(torch.float64)
    run(params, opt, 4)
    twins, twin = copy.deepcopy((params, opt))
    run(params, opt, 4, seed=300)
    run(twins, twin, 4, seed=300)
    assert exactly_equal(snapshot(opt), snapshot(twin))


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("index,match", [(1, "gradient of conv1, tensor 1"), (3, "gradient of .*1 tensors in all")])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_gradient_that_is_not_finite_raises_and_moves_nothing(value, index, match, first):
    params, opt = mixed()
    run(params, opt, first)
    for p in params:
        p.grad = torch.ones_like(p)
    params[index].grad.view(-1)[-1] = value
    before = snapshot(opt)
    with pytest.raises(ValueError, match=match):
        opt.step()
    assert exactly_equal(snapshot(opt), before)


def test_finite_gradients_whose_norm_overflows_are_a_step():
    w = parameter(4, 3, dtype=torch.float32)
    opt = SplitLBI([{"params": [w], "penalty": "group"}], lr=1e-30)
    before = w.detach().clone()
    w.grad = torch.full_like(w, 1e30)
    opt.step()
    torch.testing.assert_close(w.detach(), before - 1)


OTHERS = [{"penalty": "l1"}, {"axis": 1}, {"block": 2}]
OTHERS += [{"params": p} for p in ([parameter(5, 4)], [parameter(4, 5)], [parameter(4, 4), parameter(4)])]


@pytest.mark.parametrize(
    "group,match",
    [
        ({"penalty": None}, "lifts 1, this optimizer 0; first difference: conv1"),
        ({"name": "conv2"}, "first difference: conv1"),
        *((other, "other groups") for other in OTHERS),
    ],
)
def test_the_state_of_other_groups_is_refused(group, match):
    base = {"params": [parameter(4, 4)], "penalty": "group", "name": "conv1"}
    saved = SplitLBI([base], lr=0.1)
    base["params"][0].grad = torch.ones_like(base["params"][0])
    saved.step()
    opt = SplitLBI([{**base, **group}], lr=0.1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved.state_dict())
    assert exactly_equal(opt.state_dict(), before)


# ---- cost
@pytest.mark.alone
def test_a_step_does_not_loop_over_units():
    p = parameter(20_000, 4, dtype=torch.float32)
    opt = SplitLBI([{"params": [p], "penalty": "group"}], lr=0.1, nu=1.0, lam=0.1)
    seconds = []
    for _ in range(5):
        p.grad = torch.ones_like(p)
        start = time.process_time()
        opt.step()
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
    assert (opt.state[p]["entered"] > 0).any()


def test_numbers_that_are_tensors_are_kept_as_numbers():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SplitLBI([p], lr=0.1, nu=torch.tensor(5.0), momentum=np.float32(0.5))
    assert [type(optimizer.param_groups[0][key]) for key in ("nu", "momentum")] == [float, float]
    with pytest.raises(ValueError, match="nu=.*must be a number"):
        SplitLBI([p], lr=0.1, nu=torch.tensor(True))
