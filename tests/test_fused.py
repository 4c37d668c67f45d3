"""The compiled step against plain tensor operations: same numbers, same path, same state, and clear refusals."""

import copy
import multiprocessing
import subprocess
from types import SimpleNamespace

import pytest
import torch

from hf_effdl.structure.optim import fused_cpu as fused
from hf_effdl.structure.optim.fused_gpu import CompiledGroups
from hf_effdl.structure.optim.split_lbi import SplitLBI


INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread(compiler):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHAPES = [(4,), (6, 4, 3, 3), (5, 7), (3, 2), (40, 30, 3, 3), (8, 12), (5, 6, 4, 4), (), (7, 3)]


def make(dtype=torch.float32, seed=0, **hyper):
    """Every kind of tensor: rows, columns, blocks, several slices, another memory format, l1, not lifted, no axes."""
    params = [tensor(shape, seed + i, dtype) for i, shape in enumerate(SHAPES)]
    params[6] = params[6].contiguous(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(p) for p in params]
    bn, conv, head, plain, rows, blocks, strided, scalar, columns = params
    groups = [
        {"params": [bn, conv], "penalty": "group", "axis": [0, 1], "scale": [1.7, 0.4], "name": "conv1"},
        {"params": [head], "penalty": "l1", "name": "head"},
        {"params": [plain, scalar]},
        {"params": [rows], "penalty": "group", "name": "rows"},
        {"params": [blocks], "penalty": "group", "axis": 1, "block": 3, "name": "blocks", "weight_decay": 0.01},
        {"params": [strided], "penalty": "group", "axis": 1, "name": "strided"},
        {"params": [columns], "penalty": "group", "axis": 1, "name": "columns"},
    ]
    return params, SplitLBI(groups, **{"lr": 0.1, "nu": 1.0, **hyper})


def tensor(shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(params, opt, steps, without=(), seed=100):
    for step in range(steps):
        for i, p in enumerate(params):
            noise, target = tensor(p.shape, seed + 10 * step + i), 2 * tensor(p.shape, 30 + i)
            grad = (0.1 * noise + 0.5 * (p.detach().double() - target)).to(p.dtype)
            p.grad = None if i in without else grad
        opt.step()


def assert_same(one, other, rtol):
    """Weights and state to `rtol` of the largest entry of each tensor, and the path exactly."""
    (params, opt), (others, opt2) = one, other
    for p, q in zip(params, others, strict=True):
        pairs = {"weight": (p.detach(), q.detach())} | {
            name: (value, opt2.state[q][name]) for name, value in opt.state[p].items()
        }
        assert opt.state[p].keys() == opt2.state[q].keys()
        for name, (a, b) in pairs.items():
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.dtype == torch.int64:
                assert torch.equal(a, b), name
            else:
                assert (a.double() - b.double()).abs().max() <= rtol * a.double().abs().max().clamp_min(1e-2), name


def moves(opt):
    """When each unit entered, or where all were in from the start, left."""
    units = [state for state in opt.state.values() if "entered" in state]
    return torch.cat([torch.where(unit["entered"] == 0, unit["left"], unit["entered"]) for unit in units])


BASES = [
    {},
    {"momentum": 0.0},
    {"nesterov": True, "weight_decay": 0.02},
    {"weight_decay": 0.02, "decoupled_weight_decay": True, "kappa": 2.0},
    {"lam_scale": "none", "lam": 2.0, "path_scale": 0.8},
    {"base": "adamw", "lr": 0.05, "nu": 0.4, "lam": 0.7, "weight_decay": 0.1},
    {"base": "adamw", "lr": 0.05, "nu": 0.4, "lam": 0.7, "weight_decay": 0.1, "decoupled_weight_decay": False},
    {"start": "dense", "rise": 1.7},
]


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("hyper", BASES)
def test_a_run_has_the_same_path(hyper, dtype, rtol):
    runs = [make(dtype, **hyper, fused=choice) for choice in (False, True)]
    for params, opt in runs:
        run(params, opt, 40)
    assert_same(*runs, rtol)
    moved = moves(runs[0][1])
    assert (moved > 0).any() and (moved < 40).all()
    assert len(moved.unique()) > 3


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1), (2, 3), (4, 5, 6)])
@pytest.mark.parametrize("hyper", [{}, {"base": "adamw", "lr": 0.05, "nu": 0.4}])
def test_parameters_without_gradient_wait(without, hyper):
    for first in (0, 5):
        runs = [make(torch.float64, fused=choice, **hyper) for choice in (False, True)]
        for steps, missing, seed in ((first, (), 100), (3, without, 300), (3, (), 600)):
            for params, opt in runs:
                run(params, opt, steps, missing, seed)
            assert_same(*runs, 1e-13)


def test_bfloat16_weights_round_once_and_keep_a_float32_dual():
    params, opt = make(torch.bfloat16, fused=True, momentum=0.0)
    exact, reference = make(torch.float32, fused=False, momentum=0.0)
    with torch.no_grad():
        for p, q in zip(params, exact, strict=True):
            q.copy_(p)
    for p, q in zip(params, exact, strict=True):
        p.grad = torch.full_like(p, 0.3125)
        q.grad = torch.full_like(q, 0.3125)
    opt.step()
    reference.step()
    for p, q in zip(params, exact, strict=True):
        assert p.dtype == torch.bfloat16
        off = (p.float() - q).abs()  # to nearest: half a step of the format, and what float32 rounds
        assert (off <= q.abs() * 2**-8 * 1.0001 + 1e-30).all()
        if "dual" in opt.state[p]:
            assert opt.state[p]["dual"].dtype == torch.float32
            torch.testing.assert_close(opt.state[p]["dual"], reference.state[q]["dual"], rtol=1e-6, atol=1e-9)


def test_bfloat16_rounds_as_torch_does():
    p = torch.nn.Parameter(tensor((50_000,), 0, torch.bfloat16))
    start = p.detach().clone()
    opt = SplitLBI([p], lr=0.25, momentum=0.0, fused=True)
    p.grad = tensor((50_000,), 1, torch.bfloat16)
    expected = (start.float() - 0.25 * p.grad.float()).bfloat16()
    opt.step()
    assert torch.equal(p.detach(), expected)


PIECES = [((300, 700), 0, 1), ((300, 700), 1, 1), ((70_000, 3), 1, 1), ((3, 70_000), 1, 2), ((2, 200_000), 0, 1)]
PIECES += [((100, 64, 3, 3), 1, 4), ((5000, 8, 8), 0, 1), ((9, 1, 3000), 2, 1), ((1, 90_000), 0, 1)]


@pytest.mark.parametrize("shape,axis,block", PIECES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tensors_of_many_pieces(shape, axis, block, threads):
    """Also that the number of threads changes no bit."""
    results = []
    before = torch.get_num_threads()
    for choice, count in ((False, 1), (True, 1), (True, threads)):
        torch.set_num_threads(count)
        p = torch.nn.Parameter(tensor(shape, 0))
        opt = SplitLBI([{"params": [p], "penalty": "group", "axis": axis, "block": block}], 0.1, nu=1.0, fused=choice)
        for step in range(3):
            p.grad = tensor(shape, 1 + step)
            opt.step()
        results.append(([p], opt))
    torch.set_num_threads(before)
    assert_same(results[0], results[1], 1e-13)
    assert torch.equal(results[1][0][0], results[2][0][0])
    assert all(
        torch.equal(results[1][1].state[results[1][0][0]][k], v)
        for k, v in results[2][1].state[results[2][0][0]].items()
    )


def test_gradients_in_another_memory_format_and_weights_that_change_theirs():
    runs = [make(torch.float64, fused=choice) for choice in (False, True)]
    for params, opt in runs:
        run(params, opt, 3)
        for p in params:
            p.grad = torch.ones_like(p) * 0.1
        params[4].grad = tensor(params[4].shape, 5).contiguous(memory_format=torch.channels_last)
        opt.step()
        with torch.no_grad():
            params[4].data = params[4].data.contiguous(memory_format=torch.channels_last)
        run(params, opt, 3, seed=400)
    assert_same(*runs, 1e-13)


def test_a_reloaded_optimizer_continues_bit_for_bit_and_plain_and_fused_may_take_turns():
    params, opt = make(fused=True)
    run(params, opt, 8)
    saved = copy.deepcopy(opt.state_dict())
    assert "fused" not in saved["param_groups"][0]
    others, resumed = make(seed=50, fused=True)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed.load_state_dict(saved)
    run(params, opt, 8, seed=700)
    run(others, resumed, 8, seed=700)
    assert_same((params, opt), (others, resumed), 0.0)
    plain_params, plain = make(seed=50, fused=False)
    with torch.no_grad():
        for p, q in zip(params, plain_params, strict=True):
            q.copy_(p)
    plain.load_state_dict(opt.state_dict())
    run(params, opt, 2, seed=1500)
    run(plain_params, plain, 2, seed=1500)
    assert_same((params, opt), (plain_params, plain), 1e-5)


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_gradient_that_is_not_finite_raises_and_moves_nothing(value, dtype, steps):
    for at in (0, 1, 4, 6):
        params, opt = make(dtype, fused=True)
        run(params, opt, steps)
        for p in params:
            p.grad = torch.full_like(p, torch.finfo(dtype).max)  # large, but finite
        params[at].grad[(-1,) * params[at].ndim] = value
        before = copy.deepcopy([opt.state_dict()["state"], [p.detach() for p in params]])
        with pytest.raises(ValueError, match=r"gradient of .* \(1 tensors in all\) has NaN or infinite entries"):
            opt.step()
        after = [opt.state_dict()["state"], [p.detach() for p in params]]
        assert str(after) == str(before)


def test_large_finite_gradients_are_a_step():
    p = torch.nn.Parameter(torch.ones(4, 3))
    opt = SplitLBI([p], lr=1e-30, fused=True)
    p.grad = torch.full_like(p, 1e30)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.zeros(4, 3))


def test_what_changes_its_form_is_never_read_in_the_old_one():
    """The loop reads raw memory: another dtype or shape must be noticed."""
    runs = [make(torch.float64, fused=choice) for choice in (False, True)]
    for params, opt in runs:
        run(params, opt, 3)
        state = opt.state[params[4]]
        state["momentum_buffer"] = state["momentum_buffer"].float()  # as from a checkpoint in another dtype
        state["dual"] = state["dual"].float()
        state["momentum_buffer"], state["dual"] = state["momentum_buffer"].double(), state["dual"].double()
        run(params, opt, 2, seed=300)
    assert_same(*runs, 1e-12)
    params, opt = make(torch.float32, fused=True)
    run(params, opt, 3)
    state = opt.state[params[3]]
    state["momentum_buffer"] = state["momentum_buffer"].double()
    kept = state["momentum_buffer"].clone()
    params[3].grad = torch.zeros_like(params[3])
    opt.step()
    assert state["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(state["momentum_buffer"].double(), 0.9 * kept)
    params[4].data = params[4].data[:10].clone()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        ValueError, match=r"momentum_buffer of a parameter of shape \(10, 30, 3, 3\).*\(40, 30, 3, 3\)"
    ):
        opt.step()


@pytest.mark.parametrize("choice", [False, True])
def test_a_learning_rate_may_be_a_tensor_that_is_written_to(choice):
    results = []
    for tensor_rate in (False, True):
        params, opt = make(torch.float64, fused=choice)
        rate = torch.tensor(0.1, dtype=torch.float64)
        for step in range(6):
            rate.fill_(0.1 / (1 + step))
            for group in opt.param_groups:
                group["lr"] = rate if tensor_rate else rate.item()
            run(params, opt, 1, seed=100 + 20 * step)
        results.append((params, opt))
    assert_same(*results, 0.0)
    rate.fill_(float("nan"))
    with pytest.raises(ValueError, match="lr=.*nan"):
        opt.step()


def test_slices_of_two_precisions_have_no_common_loop():
    params = [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    group = {"params": params, "penalty": "group", "name": "g"}
    with pytest.raises(ValueError, match="V of group 'g' would be torch.float32 and torch.float64.*fused=False"):
        SplitLBI([group], lr=0.1, fused=True)
    mixed = [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    opt = SplitLBI([{"params": mixed, "penalty": "group"}], lr=0.1, nu=1.0, fused=True)
    for p in mixed:
        p.grad = torch.ones_like(p)
    opt.step()
    size = sum(opt.state[p]["dual"].square().sum(1) for p in mixed).sqrt()
    torch.testing.assert_close(opt.state[mixed[0]]["norm"], size)


# ---- building


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EFFDL_CACHE", str(tmp_path / "cache"))
    fused.library.cache_clear()
    yield tmp_path
    fused.library.cache_clear()


def build():
    return SplitLBI([torch.nn.Parameter(torch.ones(4, 3))], lr=0.1, fused=True)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch, fresh_build):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh_build))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler and found none .*fused=False"):
        build()
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    with pytest.raises(ValueError, match="found a-compiler-that-is-not-there .*fused=False"):
        build()


def test_a_compiler_that_fails_is_named_with_what_it_said(monkeypatch, fresh_build):
    script = fresh_build / "broken-c++"
    script.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(ValueError, match="broken-c.. failed to build .*fused=False.* It said: no such option"):
        build()
    assert not list((fresh_build / "cache").glob("*")), "nothing half-built stays"
    script.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo junk > "$2"; shift; done\n')
    with pytest.raises(ValueError, match="cannot load .*fused=False"):
        build()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, fresh_build):
    (fresh_build / "file").write_text("")
    monkeypatch.setenv("HF_EFFDL_CACHE", str(fresh_build / "file" / "cache"))
    with pytest.raises(ValueError, match="cannot be made .*HF_EFFDL_CACHE.* fused=False"):
        build()


@pytest.mark.parametrize("choice", [None, False])
def test_no_compiler_is_waited_for_unless_asked(monkeypatch, choice):
    def never():
        raise AssertionError("compiling")

    monkeypatch.setattr(fused, "library", never)
    monkeypatch.setattr(subprocess, "run", never)
    params, opt = make(fused=choice)
    run(params, opt, 2)


def build_and_step():
    fused.library.cache_clear()
    p = torch.nn.Parameter(torch.ones(3))
    opt = SplitLBI([p], lr=0.1, momentum=0.0, fused=True)
    p.grad = torch.ones(3)
    opt.step()
    assert torch.allclose(p, torch.full((3,), 0.9))


def test_processes_that_build_at_once_end_with_one_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EFFDL_CACHE", str(tmp_path))
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # saves importing torch
    processes = [multiprocessing.get_context(fork).Process(target=build_and_step) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    [built] = tmp_path.iterdir()
    assert built.suffix == ".so"


def test_what_has_no_compiled_loop_is_refused_by_name():
    half = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="group 'unnamed' has dtype torch.float16 .*fused=False"):
        SplitLBI([half], lr=0.1, fused=True)
    gaps = torch.nn.Parameter(torch.ones(8, 6)[:, ::2])
    with pytest.raises(ValueError, match="strides .* gaps or overlaps .*fused=False"):
        SplitLBI([gaps], lr=0.1, fused=True)
    repeated = torch.ones(1, 3).expand(4, 3).requires_grad_()
    with pytest.raises(ValueError, match="gaps or overlaps .*fused=False"):
        SplitLBI([repeated], lr=0.1, fused=True)


def test_parameters_on_two_kinds_of_device_are_refused():
    def stand_in(device):
        return SimpleNamespace(device=torch.device(device))

    groups = [{"name": "a", "params": [stand_in("cpu")]}, {"name": "b", "params": [stand_in("cuda:0")]}]
    with pytest.raises(ValueError, match="on cpu and cuda, .*fused=False"):
        fused.check(groups)


# ---- what a GPU would run, compiled for the CPU


def compiled_for_gpu(dtype, backend, **hyper):
    params, opt = make(dtype, **hyper, fused=True)
    opt.kernel = CompiledGroups(opt.param_groups, backend)
    return params, opt


@pytest.mark.parametrize("hyper", [BASES[2], BASES[4], BASES[5]])
def test_the_update_that_is_compiled_for_a_gpu_has_the_same_numbers(hyper):
    runs = [make(torch.float64, **hyper, fused=False), compiled_for_gpu(torch.float64, "eager", **hyper)]
    for params, opt in runs:
        run(params, opt, 10)
        run(params, opt, 2, without=(1, 2, 5), seed=500)
        run(params, opt, 10, seed=600)
    assert_same(*runs, 1e-12)
    assert (moves(runs[0][1]) > 0).any()


def test_the_compiled_update_makes_kernels():
    runs = [make(fused=False), compiled_for_gpu(torch.float32, "inductor")]
    for params, opt in runs:
        keep = opt.param_groups[:1]  # two slices of a unit; every group compiles for some seconds
        opt.param_groups = keep
        opt.kernel = opt.kernel and CompiledGroups(keep)
        run(params[:2], opt, 5)
    assert_same(*[(params[:2], opt) for params, opt in runs], 1e-5)


def test_more_kinds_of_groups_than_torch_compiles_by_itself():
    params = [torch.nn.Parameter(tensor((3, 4 + i), i)) for i in range(10)]
    opt = SplitLBI(
        [{"params": [p], "penalty": "group", "name": str(i)} for i, p in enumerate(params)], 0.1, fused=True
    )
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    opt.kernel = CompiledGroups(opt.param_groups, backend)
    for step in range(3):
        for group in opt.param_groups:
            group["lr"] = 0.1 / (step + 1)  # a new number is no new kernel
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert len(calls) == 10


def test_a_gpu_compiler_that_fails_is_named():
    params, opt = make(fused=True)

    def backend(graph, _):
        raise RuntimeError("no ptxas")

    opt.kernel = CompiledGroups(opt.param_groups, backend)
    with pytest.raises(ValueError, match="(?s)torch.compile failed on group 'conv1' .*no ptxas.*fused=False"):
        run(params, opt, 1)
    assert int(opt.state[params[0]]["step"]) == 0
