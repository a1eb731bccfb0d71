r"""One step of a long short-term memory.

Paper: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 1997; the forget gate is of Gers,
Schmidhuber and Cummins, "Learning to Forget: Continual Prediction with LSTM", Neural Computation 2000.

Shapes
    N items, I features in, H hidden units. The gates are stacked in the order i, f, g, o.

Forward
    a  = W_x x + b_x + W_h h + b_h                     for each gate
    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o),   g = tanh(a_g)
    c' = f c + i g
    h' = o tanh(c')

Backward, with a bar for "gradient of the loss with respect to"
    c*     = c'bar + h'bar o (1 - tanh(c')^2)          c' is used twice: kept, and shown
    a_ibar = c* g i (1 - i)
    a_fbar = c* c f (1 - f)
    a_gbar = c* i (1 - g^2)
    a_obar = h'bar tanh(c') o (1 - o)
    xbar   = abar W_x,   hbar = abar W_h,   cbar = c* f
    W_xbar = sum_n abar x,   W_hbar = sum_n abar h,   b_xbar = b_hbar = sum_n abar

Choices
    Gates in torch's order, and its two biases that do the same; leave out either or both with None.
    Keras: the same order, its candidate is called c; one bias. No peepholes, no clipping.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped, tree_map
from refattn.elementwise import sigmoid


class Params(NamedTuple):
    w_x: Shaped[Array, "4 H I"]
    w_h: Shaped[Array, "4 H H"]
    b_x: Shaped[Array, "4 H"] | None = None
    b_h: Shaped[Array, "4 H"] | None = None


class State(NamedTuple):
    h: Shaped[Array, "N H"]
    c: Shaped[Array, "N H"]


class Saved(NamedTuple):
    x: Shaped[Array, "N I"]
    state: State
    gates: tuple  # i, f, g, o
    tanh_c: Shaped[Array, "N H"]
    params: Params


def init(rng, inputs, hidden, bias=True):
    """Normal weights of variance 1 / H, zero biases."""
    w_x, w_h = (rng.normal(size=(4, hidden, n)) / math.sqrt(hidden) for n in (inputs, hidden))
    return Params(w_x, w_h, *(np.zeros((4, hidden)) if bias else None for _ in range(2)))


@shaped
def forward(x: Shaped[Array, "N I"], state: State, params: Params) -> tuple[State, Saved]:
    a = np.einsum("ni,ghi->gnh", x, params.w_x) + np.einsum("nk,ghk->gnh", state.h, params.w_h)
    for bias in (params.b_x, params.b_h):
        a = a if bias is None else a + bias[:, None]
    i, f, g, o = sigmoid(a[0]), sigmoid(a[1]), np.tanh(a[2]), sigmoid(a[3])
    c = f * state.c + i * g
    tanh_c = np.tanh(c)
    return State(o * tanh_c, c), Saved(x, state, (i, f, g, o), tanh_c, params)


@shaped
def backward(dnew: State, saved: Saved) -> tuple[Shaped[Array, "N I"], State, Params]:
    x, (h, c), (i, f, g, o), tanh_c, params = saved
    dc = dnew.c + dnew.h * o * (1 - tanh_c * tanh_c)
    da_i = dc * g * i * (1 - i)
    da_f = dc * c * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dnew.h * tanh_c * o * (1 - o)
    da = np.stack([da_i, da_f, da_g, da_o])
    dx, dh = np.einsum("gnh,ghi->ni", da, params.w_x), np.einsum("gnh,ghk->nk", da, params.w_h)
    dw_x, dw_h = np.einsum("gnh,ni->ghi", da, x), np.einsum("gnh,nk->ghk", da, h)
    db_x, db_h = (None if bias is None else da.sum(axis=1) for bias in (params.b_x, params.b_h))
    return dx, State(dh, dc * f), Params(dw_x, dw_h, db_x, db_h)


def example(draw):
    batch, inputs, hidden = draw.size("N", high=3), draw.size("I", high=3), draw.size("H", high=3)
    params = draw.like(init(draw.rng, inputs, hidden, bias=draw.choice("bias", True, False)))
    if draw.choice("one bias", False, True):
        params = params._replace(b_h=None)
    state = State(draw.array(batch, hidden), draw.array(batch, hidden))
    args = draw.array(batch, inputs), state, params
    return Call(tree_map(lambda a: a / 8, args), {})  # a saturated gate hides mistakes


ABOUT = About(laws=("batch_independent",), witnesses=("authors' code", "framework", "definition"))
