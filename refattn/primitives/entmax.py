r"""1.5-entmax along one axis, over the entries a mask allows.

Half-way between softmax (alpha = 1) and sparsemax (alpha = 2): smooth, and yet scores too small get exactly 0.
It maximises sum_i p_i s_i + H(p) over p >= 0 that sum to 1, with the entropy H(p) = 4/3 sum_i (p_i - p_i^1.5).

Paper: Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", ACL 2019 (arXiv:1905.05702), algorithm 2.

Forward, with z = s / 2 sorted: z_(1) >= z_(2) >= ...; mu_j and ss_j are the mean of the first j and the sum of the
squares of their distances from it
    tau_j = mu_j - sqrt((1 - ss_j) / j)
    k     = the largest j with tau_j < z_(j)
    r_i   = max(z_i - tau_k, 0)
    p_i   = r_i^2                             over allowed i;  p_i = 0 elsewhere

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = r_i (pbar_i - sum_j r_j pbar_j / sum_j r_j)

Choices
    This is alpha = 1.5 alone, the one that sorting solves exactly; others need bisection.
    The largest allowed score is subtracted first, which changes nothing; then tau lies in [-1, 0), and what is below -1
    cannot be in the support. A row with nothing allowed, or with scores of -inf alone, is all zeros, and so is its
    gradient. What is masked is never read. A score exactly at tau is outside of the support.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.elementwise import relu


class Saved(NamedTuple):
    r: Shaped[Array, "*S"]
    p: Shaped[Array, "*S"]
    axis: int


@shaped
def forward(
    s: Shaped[Array, "*S"], *, axis: int = -1, mask: Shaped[Bools, "*S"] | None = None
) -> tuple[Shaped[Array, "*S"], Saved]:
    expect(-s.ndim <= axis < s.ndim, "entmax.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    allowed = np.ones(s.shape, bool) if mask is None else mask
    top = np.where(allowed, s.real, -np.inf).max(axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top).astype(s.real.dtype)
    outside = ~allowed | (s.real < top - 4)
    z = np.where(outside, -2, (s - top) / 2)  # any number below -1 would do
    largest_first = np.take_along_axis(z, np.argsort(-z.real, axis=axis, kind="stable"), axis)
    j = np.arange(1, s.shape[axis] + 1, dtype=top.dtype).reshape(-1, *(1,) * (s.ndim - 1 - axis % s.ndim))
    mu = largest_first.real.cumsum(axis) / j
    ss = (largest_first.real**2).cumsum(axis) - j * mu * mu
    holds = mu - np.sqrt(relu(1 - ss) / j) < largest_first.real  # of the first k, and of no others
    k = np.maximum(holds.sum(axis=axis, keepdims=True, dtype=top.dtype), 1)
    mu = np.where(j <= k, largest_first, 0).sum(axis=axis, keepdims=True) / k
    ss = np.where(j <= k, (largest_first - mu) ** 2, 0).sum(axis=axis, keepdims=True)
    r = np.where(outside, 0, relu(z - (mu - np.sqrt((1 - ss) / k))))
    p = r * r
    return p, Saved(r, p, axis)


@shaped
def backward(dp: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    r, _, axis = saved
    total = r.sum(axis=axis, keepdims=True)
    return (r * (dp - (r * dp).sum(axis=axis, keepdims=True) / np.where(total == 0, 1, total)),)


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    mask = draw.mask(*shape) if draw.choice("masked", False, True) else None
    return Call((draw.array(*shape),), {"mask": mask, "axis": draw.choice("axis", -1, 1, 0)})


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
