r"""Softmax with one more term in the denominator, along one axis.

A row may say "none of these": its weights sum to less than 1, and to almost 0 where all scores are very negative.

Paper: Miller, "Attention Is Off By One", 2023 (evanmiller.org); with a learned term: attention sinks.

Forward
    p_i = e^{s_i} / (1 + sum_j e^{s_j})       over allowed i and j;  p_i = 0 elsewhere

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = p_i (pbar_i - sum_j pbar_j p_j)  as in softmax, whose row has one more entry that nobody looks at

Choices
    max(0, the largest allowed score) is subtracted first from all exponents, that of 1 = e^0 too: nothing overflows.
    A row with nothing allowed, or with scores of -inf alone, is all zeros. What is masked is never read.
    Also called softmax1, off-by-one softmax, smooth softmax (ONNX Runtime), and zero sinks.
    Adding a constant to all scores does change it, unlike softmax.
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
    expect(-s.ndim <= axis < s.ndim, "softmax_plus_one.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    allowed = np.ones(s.shape, bool) if mask is None else mask
    top = np.where(allowed, s.real, 0).max(axis=axis, keepdims=True, initial=0)
    e = np.where(allowed, np.exp(np.where(allowed, s - top, 0)), 0)
    p = e / (np.exp(-top) + e.sum(axis=axis, keepdims=True))
    return p, Saved(p, axis)


@shaped
def backward(dp: Shaped[Array, "*S"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    p, axis = saved
    return (p * (dp - (dp * p).sum(axis=axis, keepdims=True)),)


def example(draw):
    shape = draw.size("A"), draw.size("B", high=5), draw.size("C")
    mask = draw.mask(*shape) if draw.choice("masked", False, True) else None
    return Call((draw.array(*shape),), {"mask": mask, "axis": draw.choice("axis", -1, 1, 0)})


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
