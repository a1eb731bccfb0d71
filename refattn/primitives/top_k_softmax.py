r"""Softmax over the k largest scores along one axis.

Paper: Zhao et al., "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection", 2019
(arXiv:1912.11637); Wang et al., "KVT: k-NN Attention for Boosting Vision Transformers", ECCV 2022 (arXiv:2106.00515).

Forward
    kept = the k largest allowed scores of the row, or all of them where they are fewer
    p_i  = e^{s_i} / sum_j e^{s_j}            over kept i and j;  p_i = 0 elsewhere

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = p_i (pbar_i - sum_j pbar_j p_j)  the choice of what is kept has no gradient

Choices
    Among equals the first are kept, so that there are never more than k. ties="all" keeps all scores that are at least
    the k-th largest, as the code of Zhao et al. and x-transformers do: then there may be more.
    k may be larger than the row. A masked score is never kept, nor read. NaN counts as the largest, and so is not lost.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import softmax


class Saved(NamedTuple):
    p: Shaped[Array, "*S"]
    axis: int


@shaped
def forward(
    s: Shaped[Array, "*S"], *, k: int, axis: int = -1, mask: Shaped[Bools, "*S"] | None = None, ties: str = "first"
) -> tuple[Shaped[Array, "*S"], Saved]:
    expect(isinstance(k, (int, np.integer)) and k > 0, "top_k_softmax.forward: k", k, "a positive int")
    expect(-s.ndim <= axis < s.ndim, "top_k_softmax.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    expect(ties in ("first", "all"), "top_k_softmax.forward: ties", ties, "'first' or 'all'")
    allowed = np.ones(s.shape, bool) if mask is None else mask
    largest_first = np.where(allowed, np.where(np.isnan(s.real), -np.inf, -s.real), np.inf)
    place = np.argsort(np.argsort(largest_first, axis=axis, kind="stable"), axis=axis)
    kept = place < k
    if ties == "all":
        last = np.where(kept, largest_first, -np.inf).max(axis=axis, keepdims=True, initial=-np.inf)
        kept = largest_first <= last
    p, _ = softmax.forward(s, axis=axis, mask=allowed & kept)
    return p, Saved(p, axis)


@shaped
def backward(dp: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    return softmax.backward(dp, softmax.Saved(*saved))


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    options = {
        "k": draw.size("k", high=3),
        "axis": draw.choice("axis", -1, 1, 0),
        "mask": draw.mask(*shape) if draw.choice("masked", False, True) else None,
        "ties": draw.choice("ties", "first", "all"),
    }
    return Call((draw.array(*shape),), options)


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
