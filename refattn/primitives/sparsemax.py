r"""Sparsemax along one axis, over the entries a mask allows.

The probabilities closest to the scores: argmin |p - s|^2 over p >= 0 that sum to 1. Scores too small get exactly 0.

Paper: Martins and Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
ICML 2016 (arXiv:1602.02068), algorithm 1 and section 2.5.

Forward, with the scores sorted: s_(1) >= s_(2) >= ...
    k   = the largest j with 1 + j s_(j) > s_(1) + ... + s_(j)
    tau = (s_(1) + ... + s_(k) - 1) / k
    p_i = max(s_i - tau, 0)                   over allowed i;  p_i = 0 elsewhere

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = pbar_i - mean of pbar over the support, for i in the support (p_i > 0);  0 elsewhere

Choices
    The largest allowed score is subtracted first, which changes nothing; then tau lies in [-1, 0), and what is below -1
    cannot be in the support. A row with nothing allowed, or with scores of -inf alone, is all zeros, and so is its
    gradient. What is masked is never read. A score exactly at tau is outside of the support.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.elementwise import relu


class Saved(NamedTuple):
    p: Shaped[Array, "*S"]
    axis: int


@shaped
def forward(
    s: Shaped[Array, "*S"], *, axis: int = -1, mask: Shaped[Bools, "*S"] | None = None
) -> tuple[Shaped[Array, "*S"], Saved]:
    expect(-s.ndim <= axis < s.ndim, "sparsemax.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    allowed = np.ones(s.shape, bool) if mask is None else mask
    top = np.where(allowed, s.real, -np.inf).max(axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top).astype(s.real.dtype)
    outside = ~allowed | (s.real < top - 2)
    z = np.where(outside, -2, s - top)  # any number below -1 would do
    largest_first = np.take_along_axis(z, np.argsort(-z.real, axis=axis, kind="stable"), axis)
    j = np.arange(1, s.shape[axis] + 1, dtype=top.dtype).reshape(-1, *(1,) * (s.ndim - 1 - axis % s.ndim))
    holds = 1 + j * largest_first.real > largest_first.real.cumsum(axis)  # of the first k, and of no others
    k = np.maximum(holds.sum(axis=axis, keepdims=True, dtype=top.dtype), 1)
    tau = (np.where(j <= k, largest_first, 0).sum(axis=axis, keepdims=True) - 1) / k
    p = np.where(outside, 0, relu(z - tau))
    return p, Saved(p, axis)


@shaped
def backward(dp: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    p, axis = saved
    support = (p.real > 0).astype(p.real.dtype)
    size = np.maximum(support.sum(axis=axis, keepdims=True), 1)
    return (support * (dp - (support * dp).sum(axis=axis, keepdims=True) / size),)


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    mask = draw.mask(*shape) if draw.choice("masked", False, True) else None
    return Call((draw.array(*shape),), {"mask": mask, "axis": draw.choice("axis", -1, 1, 0)})


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
