r"""Logarithm of a sum of exponentials.

Along one axis, over the entries a mask allows: softmax's denominator, without overflow.

Shapes
    *S any axes; *T those without the one that is summed over, or with a 1 in its place (keepdims).

Forward
    y = log sum_i e^{s_i}                     over allowed i

Backward, with a bar for "gradient of the loss with respect to"
    sbar_i = ybar p_i                         p = softmax(s) over allowed i, 0 elsewhere

Choices
    The largest allowed score is subtracted first, and added again last: nothing overflows. A row with nothing allowed,
    or with scores of -inf alone, gives -inf, the logarithm of an empty sum, and its gradient is zero: no NaN is made.
    What is masked is never read.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    p: Shaped[Array, "*S"]
    axis: int
    keepdims: bool


@shaped
def forward(
    s: Shaped[Array, "*S"], *, axis: int = -1, keepdims: bool = False, mask: Shaped[Bools, "*S"] | None = None
) -> tuple[Shaped[Array, "*T"], Saved]:
    expect(-s.ndim <= axis < s.ndim, "logsumexp.forward: axis", axis, f"an axis of an array of shape {s.shape}")
    allowed = np.ones(s.shape, bool) if mask is None else mask
    top = np.where(allowed, s.real, -np.inf).max(axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top).astype(s.real.dtype)
    e = np.where(allowed, np.exp(np.where(allowed, s - top, 0)), 0)
    total = e.sum(axis=axis, keepdims=True)
    positive = np.where(total == 0, 1, total)
    y = np.where(total == 0, -np.inf, top + np.log(positive))
    return y if keepdims else y.squeeze(axis), Saved(e / positive, axis, keepdims)


@shaped
def backward(dy: Shaped[Array, "*T"], saved: Saved) -> tuple[Shaped[Array, "*S"]]:
    p, axis, keepdims = saved
    return (p * (dy if keepdims else np.expand_dims(dy, axis)),)


def example(draw):
    """Something is allowed in every row: where y is -inf, the laws have no numbers to compare."""
    shape, axis = (draw.size("A"), draw.size("B", high=5), draw.size("C")), draw.choice("axis", -1, 1, 0)
    mask = draw.mask(*shape) if draw.choice("masked", False, True) else None
    if mask is not None:
        mask.swapaxes(axis, -1)[..., 0] = True
    return Call((draw.array(*shape),), {"axis": axis, "keepdims": draw.choice("keepdims", False, True), "mask": mask})


ABOUT = About(weights="p", laws=("weights_in_unit_interval",), witnesses=("framework", "definition", "relation"))
