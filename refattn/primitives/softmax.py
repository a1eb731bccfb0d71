r"""Softmax along one axis, over the entries a mask allows.

Forward
    p_i = e^{s_i} / sum_j e^{s_j}             over allowed i and j;  p_i = 0 elsewhere

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = p_i (pbar_i - sum_j pbar_j p_j)  the scores themselves are not needed

Choices
    The largest allowed score is subtracted first: nothing overflows, and nothing changes, since softmax does not
    see a constant. A row with nothing allowed, or with scores of -inf alone, is all zeros, and so is its gradient:
    no NaN is made here. What is masked is never read: NaN and inf behind the mask stay there.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    p: Shaped[Array, "*S"]
    axis: int


@shaped
def forward(
    s: Shaped[Array, "*S"], *, axis: int = -1, mask: Shaped[Bools, "*S"] | None = None
) -> tuple[Shaped[Array, "*S"], Saved]:
    expect(-s.ndim <= axis < s.ndim, "softmax.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    allowed = np.ones(s.shape, bool) if mask is None else mask
    top = np.where(allowed, s.real, -np.inf).max(axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top).astype(s.real.dtype)
    e = np.where(allowed, np.exp(np.where(allowed, s - top, 0)), 0)
    total = e.sum(axis=axis, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    return p, Saved(p, axis)


@shaped
def backward(dp: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    p, axis = saved
    return (p * (dp - (dp * p).sum(axis=axis, keepdims=True)),)


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    mask = draw.mask(*shape) if draw.choice("masked", False, True) else None
    return Call((draw.array(*shape),), {"mask": mask, "axis": draw.choice("axis", -1, 1, 0)})


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("framework", "definition"))
