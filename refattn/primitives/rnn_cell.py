r"""One step of a simple recurrent network.

Paper: Elman, "Finding Structure in Time", Cognitive Science 1990.

Shapes
    N items, I features in, H hidden units.

Forward
    h' = tanh(W_x x + b_x + W_h h + b_h)

Backward, with a bar for "gradient of the loss with respect to"
    abar   = h'bar (1 - h'^2)                 a is what tanh sees
    xbar   = abar W_x,   hbar = abar W_h
    W_xbar = sum_n abar x,   W_hbar = sum_n abar h,   b_xbar = b_hbar = sum_n abar

Choices
    Two biases that do the same, as in torch; leave out either or both with None.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped, tree_map


class Params(NamedTuple):
    w_x: Shaped[Array, "H I"]
    w_h: Shaped[Array, "H H"]
    b_x: Shaped[Array, "H"] | None = None
    b_h: Shaped[Array, "H"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N I"]
    h: Shaped[Array, "N H"]
    new: Shaped[Array, "N H"]
    params: Params


def init(rng, inputs, hidden, bias=True):
    """Normal weights of variance 1 / H, zero biases."""
    w_x, w_h = (rng.normal(size=(hidden, n)) / math.sqrt(hidden) for n in (inputs, hidden))
    return Params(w_x, w_h, *(np.zeros(hidden) if bias else None for _ in range(2)))


@shaped
def forward(
    x: Shaped[Array, "N I"], h: Shaped[Array, "N H"], params: Params
) -> tuple[Shaped[Array, "N H"], Saved]:
    a = x @ params.w_x.T + h @ params.w_h.T
    for bias in (params.b_x, params.b_h):
        a = a if bias is None else a + bias
    new = np.tanh(a)
    return new, Saved(x, h, new, params)


@shaped
def backward(
    dnew: Shaped[Array, "N H"], saved: Saved
) -> tuple[Shaped[Array, "N I"], Shaped[Array, "N H"], Params]:
    x, h, new, params = saved
    da = dnew * (1 - new * new)
    db_x, db_h = (None if bias is None else da.sum(axis=0) for bias in (params.b_x, params.b_h))
    return da @ params.w_x, da @ params.w_h, Params(da.T @ x, da.T @ h, db_x, db_h)


def example(draw):
    batch, inputs, hidden = draw.size("N", high=3), draw.size("I", high=3), draw.size("H", high=3)
    params = draw.like(init(draw.rng, inputs, hidden, bias=draw.choice("bias", True, False)))
    args = draw.array(batch, inputs), draw.array(batch, hidden), params
    return Call(tree_map(lambda a: a / 8, args), {})  # a saturated tanh hides mistakes


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
