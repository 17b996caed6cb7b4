"""Data that every rank can compute, and NumPy's answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

NUMPY_OPS: dict[str, Callable[..., Any]] = {
    "sum": np.sum,
    "min": np.min,
    "max": np.max,
    "prod": np.prod,
}
INTEGERS = tuple(f"{k}int{b}" for k in ("", "u") for b in (8, 16, 32, 64))
HALVES = ("bfloat16", "float16")
COMPLEX = ("complex64", "complex128")
DTYPES = ("float32", "float64", *HALVES, *INTEGERS, *COMPLEX, "bool")
SHAPES = ((), (0,), (1,), (3, 0, 2), (17,), (5, 7), (300, 301))

same = np.testing.assert_array_equal
close = np.testing.assert_allclose


def values(rank: int, shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Return one rank's data, which every rank can compute.

    Small integers: sums and products are exact in every dtype, whatever the order.
    """
    rng = np.random.default_rng([seed, rank, *shape])
    if dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    low, high = (-3, 4) if dtype in (*HALVES, "int8") else (-9, 10)
    if dtype.startswith("uint"):
        low, high = 0, 4
    x = np.asarray(rng.integers(low, high, shape))
    if dtype in COMPLEX:
        return (x + 1j * np.asarray(rng.integers(low, high, shape))).astype(dtype)
    return x.astype(dtype)


def meaningful(op: str, dtype: str) -> bool:
    """Tell whether a reduction of this dtype makes sense."""
    if dtype == "bool":
        return op in ("min", "max")
    return dtype not in COMPLEX or op not in ("min", "max")


def reference(op: str, parts: list[np.ndarray]) -> np.ndarray:
    """Reduce the ranks' values with NumPy."""
    stack = np.stack(parts)
    if str(stack.dtype) in HALVES:
        wide = reference(op, [part.astype(np.float32) for part in parts])
        return wide.astype(stack.dtype)
    if op in ("min", "max"):
        return NUMPY_OPS[op](stack, axis=0)
    if op != "mean":
        return NUMPY_OPS[op](stack, axis=0, dtype=stack.dtype)
    total = stack.sum(axis=0, dtype=stack.dtype)
    if stack.dtype.kind == "c":
        # NumPy's own quotient of complex numbers is rounded more than once.
        parts_of = np.ascontiguousarray(total).reshape(-1).view(total.real.dtype)
        quotient = parts_of / parts_of.dtype.type(len(parts))
        return quotient.view(stack.dtype).reshape(total.shape)
    if stack.dtype.kind == "f":
        return (total / stack.dtype.type(len(parts))).astype(stack.dtype)
    return np.asarray(np.trunc(total / len(parts))).astype(stack.dtype)


class NotHere(Exception):
    """Raised by a check, on all ranks, that does not apply to a job; says why."""


def applies(condition: bool, otherwise: str) -> None:
    """Skip the rest of a check where it does not apply."""
    if not condition:
        raise NotHere(otherwise)


def raises(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
    """Insist that a call raises, with a text that says what it must."""
    try:
        jax.block_until_ready(call())
    except kind as error:
        assert re.search(match, str(error)), str(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
