r"""Logarithm of the softmax along one axis.

Forward
    y_i = s_i - log sum_j e^{s_j}

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = ybar_i - p_i sum_j ybar_j        p_i = e^{y_i}, the softmax

Choices
    The largest score is subtracted first, as in softmax: nothing overflows, and small probabilities keep their digits.
    A row with scores of -inf alone stays -inf, since its softmax is 0, and its gradient is ybar.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    y: Shaped[Array, "*S"]
    axis: int


@shaped
def forward(s: Shaped[Array, "*S"], *, axis: int = -1) -> tuple[Shaped[Array, "*S"], Saved]:
    expect(-s.ndim <= axis < s.ndim, "log_softmax.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    top = s.real.max(axis=axis, keepdims=True, initial=-np.inf)
    shifted = s - np.where(np.isneginf(top), 0, top)
    total = np.exp(shifted).sum(axis=axis, keepdims=True)
    y = shifted - np.log(np.where(total == 0, 1, total))
    return y, Saved(y, axis)


@shaped
def backward(dy: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    y, axis = saved
    return (dy - np.exp(y) * dy.sum(axis=axis, keepdims=True),)


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    return Call((draw.array(*shape),), {"axis": draw.choice("axis", -1, 1, 0)})


ABOUT = About(witnesses=("framework", "definition"))
