"""Nested plain values and tensors against each other, with a name for what differs."""

import pytest
import torch


def assert_close(a, b, tolerance: float = 1e-6, where: str = "outcome") -> None:
    """Equal to `tolerance`, integers and texts exactly; NaN equals NaN."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        exactly = tolerance == 0 or not a.is_floating_point()
        assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=tolerance, atol=tolerance), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, tolerance, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True), f"{where}: {a} != {b}"
    else:
        assert a == b, f"{where}: {a} != {b}"


def assert_same(a, b, where: str = "outcome") -> None:
    """Equal bit for bit."""
    assert_close(a, b, 0, where)
