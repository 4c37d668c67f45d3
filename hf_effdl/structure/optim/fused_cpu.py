"""The compiled step of `SplitLBI(fused=True)`: one pass over memory, built on first use.

On CPU a C++ loop (`fused_step.cpp`), compiled with the machine's own compiler and kept in a cache folder; on GPUs what
`torch.compile` makes of the same update (`fused_gpu.py`).
"""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl.files import digest
from hf_effdl.structure.optim.checks import dual_dtype, snapshot
from hf_effdl.structure.optim.kernel import Kernel, State
from hf_effdl.structure.optim.sharding import is_sharded


SOURCE = Path(__file__).with_name("fused_step.cpp")
FLAGS = [
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # where there are such registers, memory is read faster with them
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
PENALTIES = {None: 0, "l1": 1, "group": 2}
_ALIKE = ("buffer", "square", "dual")  # of the form of their parameter
_UNIT = ("step", "norm", "threshold", "entered", "left")
PLAIN, MOMENTUM, NESTEROV, ADAMW = range(4)


class _Tensor(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "grad", "buffer", "square", "dual", "updates", "l1_threshold")
        ),
        *((name, ctypes.c_int64) for name in ("numel", "outer", "units", "run", "dtype")),
        ("scale", ctypes.c_double),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("penalty", "base", "first", "tensors", "units", "wide")),
        *((name, ctypes.c_void_p) for name in ("norm", "threshold", "entered", "left", "step")),
        *(
            (name, ctypes.c_double)
            for name in (
                "lr",
                "kappa",
                "nu",
                "path_scale",
                "momentum",
                "weight_decay",
                "decoupled",
                "beta1",
                "beta2",
                "eps",
            )
        ),
    ]


# ---- building


@cache
def library() -> ctypes.CDLL:
    """The compiled loop; the first call on a machine compiles it, which takes some seconds.

    Raises:
        ValueError: if there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise ValueError(
            f"fused=True needs a C++ compiler and found {compiler or 'none'} (g++, clang++, c++, or $CXX); install "
            "one, or pass fused=False for plain tensor operations"
        )
    file = _cache_folder() / f"split_lbi-{_fingerprint(compiler)}.so"
    if not file.is_file():
        _compile(compiler, file)
    try:
        built = ctypes.CDLL(str(file))
    except OSError as error:
        raise ValueError(f"fused=True cannot load what {compiler} built ({error}); pass fused=False") from error
    built.split_lbi_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    built.split_lbi_step.restype = None
    built.gradients_are_finite.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    built.gradients_are_finite.restype = ctypes.c_int64
    return built


def _cache_folder() -> Path:
    root = os.environ.get("HF_EFFDL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hf_effdl"
    )
    folder = Path(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"fused=True keeps its compiled loop in {folder}, which cannot be made ({error}); set HF_EFFDL_CACHE to a "
            "folder that can be written, or pass fused=False"
        ) from error
    return folder


def _fingerprint(compiler: str) -> str:
    """Of everything the compiled file depends on; home folders are shared between machines with other processors."""
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    try:
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor() + platform.machine()
    whole = "\n".join([SOURCE.read_text(), version, processor, *FLAGS])
    return digest(whole)[:16]


def _compile(compiler: str, file: Path) -> None:
    # several processes may build at once: each writes a file of its own, and the last one in place wins
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part = Path(folder) / file.name
        command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            problem = done.stderr.strip()[-800:] if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(
                f"fused=True: {compiler} failed to build {SOURCE.name}; pass fused=False for plain tensor operations, "
                f"or set $CXX to another compiler. It said: {problem}"
            )
        os.replace(part, file)


# ---- what can be fused


def check(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what the compiled step cannot do; on CPU it is built here, where that is still to be done."""
    kinds = {p.device.type for group in groups for p in group["params"]} - {"meta"}
    if len(kinds) > 1:
        raise ValueError(
            f"fused=True: the parameters are on {' and '.join(sorted(kinds))}, and one compiled step works on one "
            "kind of device; move them to one, or pass fused=False"
        )
    for group in groups:
        for p in group["params"]:
            _check_tensor(p, group["name"])
        wide = sorted({str(dual_dtype(p)) for p in group["params"]})
        if group["penalty"] == "group" and len(wide) > 1:
            raise ValueError(
                f"fused=True: V of group {group['name']!r} would be {' and '.join(wide)}, and its units share one "
                "norm; give the tensors one dtype, or pass fused=False"
            )
    if kinds == {"cpu"}:
        library()


def compiled_step(groups: Sequence[dict[str, Any]]) -> Kernel:
    """The compiled step for these groups, by the device they are on."""
    check(groups)
    if any(p.device.type != "cpu" for group in groups for p in group["params"]):
        from hf_effdl.structure.optim.fused_gpu import CompiledGroups

        return CompiledGroups(groups)
    return Tables(groups)


def _check_tensor(p: Tensor, name: str) -> None:
    problem = None
    if is_sharded(p):
        problem = "is sharded by FSDP2 (a DTensor)"
    elif p.dtype not in DTYPES:
        problem = f"has dtype {p.dtype} (there are loops for float32, float64 and bfloat16)"
    elif not _is_dense(p.shape, p.stride()):
        problem = f"has strides {p.stride()}, with gaps or overlaps in memory"
    if problem:
        raise ValueError(f"fused=True: a tensor of group {name!r} {problem}; pass fused=False")


@cache
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    size = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride != size:
            return False
        size *= length
    return True


@cache
def _layout(shape: torch.Size, strides: tuple[int, ...], axis: int, block: int) -> tuple[int, int]:
    """How often the run over all units repeats in memory, and how many entries lie one after the other in a unit."""
    outer, inner = 1, block
    for dim, (stride, length) in enumerate(zip(strides, shape, strict=True)):
        if dim != axis:
            outside = stride > strides[axis] and shape[axis] > 1
            outer, inner = (outer * length, inner) if outside else (outer, inner * length)
    return outer, inner


def _form(p: Tensor) -> tuple[Any, ...]:
    return p.shape, p.stride(), p.dtype, p.device


# ---- the step


class Tables(Kernel):
    """What the compiled loop reads: one row per tensor and one per group, made once and pointed anew at every step."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups)
        members = [(p, i, group) for group in self.groups for i, p in enumerate(group["params"])]
        self.params = [p for p, _, _ in members]
        self.group_rows = (_Group * len(self.groups))()
        self.rows = (_Tensor * len(self.params))()
        self.copies: list[Tensor] = []  # of gradients in another memory format, for as long as a step takes
        self.seen: list[Any] = [None] * len(self.groups)  # what the rows hold, to leave them where nothing changed
        self.pointers: list[list[int]] = [[] for _ in self.params]
        self.strides = [p.stride() for p in self.params]
        self.forms = [_form(p) for p in self.params]
        for row, member in zip(self.rows, members, strict=True):
            _lay_out(row, *member)

    def fits(self) -> bool:
        """Whether the parameters still lie in memory as they did."""
        return all(_form(p) == form for p, form in zip(self.params, self.forms, strict=True))

    def finite(self) -> bool:
        self._point_at_gradients()
        return bool(library().gradients_are_finite(self.rows, len(self.rows), torch.get_num_threads()))

    def step(self, state: State) -> None:
        self._point_at_state(state)
        library().split_lbi_step(self.group_rows, len(self.groups), self.rows, torch.get_num_threads())
        self.copies.clear()

    def _point_at_gradients(self) -> None:
        self.copies.clear()
        for row, p, strides in zip(self.rows, self.params, self.strides, strict=True):
            grad = p.grad
            if grad is None:
                row.grad = None
                continue
            if grad.stride() != strides or grad.dtype is not p.dtype:
                grad = torch.empty_like(p).copy_(grad)
                self.copies.append(grad)
            row.grad = grad.data_ptr()

    def _point_at_state(self, state: State) -> None:
        at = 0
        for k, group in enumerate(self.groups):
            first = state[group["params"][0]] if group["penalty"] else {}
            here = [first[name].data_ptr() for name in _UNIT if name in first]
            if self.seen[k] != (group, here):
                _fill_group(self.group_rows[k], group, first, at)
                self.seen[k] = (snapshot(group), here)
            fields = _fields(group)
            for p in group["params"]:
                self._point(at, p, state.get(p, {}), fields)
                at += 1

    def _point(self, at: int, p: Tensor, own: dict[str, Any], fields: Sequence[tuple[str, str]]) -> None:
        """Have the row of a parameter point at it and at its state."""
        places = [own[name].data_ptr() for _, name in fields if name in own]
        places.append(p.data_ptr())
        if places == self.pointers[at]:
            return
        self.pointers[at] = places
        row = self.rows[at]
        row.weight = p.data_ptr()
        for field, name in fields:
            if own.get(name) is not None:  # there is none before the first gradient
                if field in _ALIKE:
                    own[name] = _in_the_form_of(p, own[name], name, self.strides[at])
                setattr(row, field, own[name].data_ptr())


def _lay_out(row: _Tensor, p: Tensor, i: int, group: Mapping[str, Any]) -> None:
    """What a row says of its parameter's form and units, which stays."""
    row.numel, row.dtype, row.scale = p.numel(), DTYPES[p.dtype], 1.0
    row.outer, row.units, row.run = 1, 1, p.numel()
    if group["penalty"] == "group":
        row.outer, row.run = _layout(p.shape, p.stride(), group["axis"][i], group["block"][i])
        row.units, row.scale = group["units"], group["scale"][i]


def _in_the_form_of(p: Tensor, value: Tensor, name: str, strides: tuple[int, ...]) -> Tensor:
    """A tensor of the state with the strides of its parameter; loaded from elsewhere it may have others."""
    if value.shape != p.shape or value.device != p.device:
        raise ValueError(
            f"{name} of a parameter of shape {tuple(p.shape)} on {p.device} has shape {tuple(value.shape)} on "
            f"{value.device}: the parameter was changed after the first step; make a new SplitLBI"
        )
    dtype = dual_dtype(p) if name == "dual" else p.dtype
    if value.stride() == strides and value.dtype is dtype:
        return value
    return torch.empty_like(p, dtype=dtype).copy_(value)


def _fields(group: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which tensors of the state a row of the table points at."""
    fields = [("buffer", "exp_avg"), ("square", "exp_avg_sq"), ("updates", "updates")]
    if group["base"] == "sgd":
        fields = [("buffer", "momentum_buffer")] if group["momentum"] else []
    if group["penalty"]:
        fields.append(("dual", "dual"))
    return [*fields, ("l1_threshold", "threshold")] if group["penalty"] == "l1" else fields


def _fill_group(row: _Group, group: Mapping[str, Any], first: Mapping[str, Tensor], at: int) -> None:
    row.penalty, row.base = PENALTIES[group["penalty"]], base_of(group)
    row.first, row.tensors = at, len(group["params"])
    row.lr, row.decoupled = float(group["lr"]), group["decoupled_weight_decay"]
    row.beta1, row.beta2 = group["betas"]
    for name in ("kappa", "nu", "path_scale", "momentum", "weight_decay", "eps"):
        setattr(row, name, group[name])
    if group["penalty"]:
        row.step = first["step"].data_ptr()
    if group["penalty"] == "group":
        row.units, row.wide = group["units"], first["norm"].dtype == torch.float64
        for name in _UNIT[1:]:
            setattr(row, name, first[name].data_ptr())


def base_of(group: Mapping[str, Any]) -> int:
    if group["base"] == "adamw":
        return ADAMW
    return NESTEROV if group["nesterov"] else MOMENTUM if group["momentum"] else PLAIN
