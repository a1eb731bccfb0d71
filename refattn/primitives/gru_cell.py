r"""One step of a gated recurrent unit.

Paper: Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk and Bengio, "Learning Phrase Representations using
RNN Encoder-Decoder for Statistical Machine Translation", EMNLP 2014 (arXiv:1406.1078), section 2.3.

Shapes
    N items, I features in, H hidden units. The gates are stacked in the order r, z, n.

Forward
    r  = sigmoid(W_xr x + b_xr + W_hr h + b_hr)       reset gate
    z  = sigmoid(W_xz x + b_xz + W_hz h + b_hz)       update gate
    p  = W_hn s + b_hn                                the recurrent part of the candidate
    n  = tanh(W_xn x + b_xn + r p),   s = h           candidate, reset_after=True
    n  = tanh(W_xn x + b_xn + p),     s = r h         candidate, reset_after=False
    h' = k h + (1 - k) n                              k = z where z_weighs="old", k = 1 - z where z_weighs="new"

Backward, with a bar for "gradient of the loss with respect to"; a is what sigmoid or tanh sees
    zbar   = h'bar (h - n)                            minus that where z_weighs="new"
    a_nbar = h'bar (1 - k) (1 - n^2)
    pbar   = a_nbar r       or  a_nbar                reset_after or not
    sbar   = pbar W_hn
    rbar   = a_nbar p       or  sbar h
    a_rbar = rbar r (1 - r),   a_zbar = zbar z (1 - z)
    hbar   = h'bar k + a_rbar W_hr + a_zbar W_hz + sbar    (or  sbar r)
    W_hbar = sum_n of a_rbar h,  a_zbar h,  pbar s;   b_hbar = sum_n of a_rbar, a_zbar, pbar
    W_xbar = sum_n abar x,   b_xbar = sum_n abar,   xbar = abar W_x

Choices
    The defaults are torch's and cuDNN's: the reset gate acts after the recurrent product, and z keeps the old state.
    Keras is alike but stacks z, r, n; its reset_after=False has one bias, b_h=None. Cho et al. reset before the
    product and keep the old state by z. Bahdanau et al. reset before, and weigh the new state by z.
    w_x=None: x comes projected already, as (N, 3 H).
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import sigmoid


class Params(NamedTuple):
    w_x: Shaped[Array, "3 H I"] | None
    w_h: Shaped[Array, "3 H H"]
    b_x: Shaped[Array, "3 H"] | None = None
    b_h: Shaped[Array, "3 H"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N I"]
    h: Shaped[Array, "N H"]
    r: Shaped[Array, "N H"]
    z: Shaped[Array, "N H"]
    p: Shaped[Array, "N H"]
    n: Shaped[Array, "N H"]
    params: Params
    reset_after: bool
    z_weighs: str


def init(rng, inputs, hidden, bias=True):
    """Normal weights of variance 1 / H, zero biases."""
    w_x, w_h = (rng.normal(size=(3, hidden, n)) / math.sqrt(hidden) for n in (inputs, hidden))
    return Params(w_x, w_h, *(np.zeros((3, hidden)) if bias else None for _ in range(2)))


@shaped
def forward(
    x: Shaped[Array, "N I"],
    h: Shaped[Array, "N H"],
    params: Params,
    *,
    reset_after: bool = True,
    z_weighs: str = "old",
) -> tuple[Shaped[Array, "N H"], Saved]:
    expect(z_weighs in ("old", "new"), "gru_cell.forward: z_weighs", z_weighs, "'old' or 'new'")
    (w_r, w_z, w_n), (b_r, b_z, b_n) = params.w_h, _bias(params.b_h)
    a_r, a_z, a_n = _project(x, params).swapaxes(0, 1)
    r = sigmoid(a_r + h @ w_r.T + b_r)
    z = sigmoid(a_z + h @ w_z.T + b_z)
    p = (h if reset_after else r * h) @ w_n.T + b_n
    n = np.tanh(a_n + (r * p if reset_after else p))
    keep = z if z_weighs == "old" else 1 - z
    return keep * h + (1 - keep) * n, Saved(x, h, r, z, p, n, params, reset_after, z_weighs)


@shaped
def backward(
    dnew: Shaped[Array, "N H"], saved: Saved
) -> tuple[Shaped[Array, "N I"], Shaped[Array, "N H"], Params]:
    x, h, r, z, p, n, params, reset_after, z_weighs = saved
    w_r, w_z, w_n = params.w_h
    keep, sign = (z, 1) if z_weighs == "old" else (1 - z, -1)
    dz = sign * dnew * (h - n)
    da_n = dnew * (1 - keep) * (1 - n * n)
    dp = da_n * r if reset_after else da_n
    ds = dp @ w_n
    dr = da_n * p if reset_after else ds * h
    da_r, da_z = dr * r * (1 - r), dz * z * (1 - z)
    dh = dnew * keep + da_r @ w_r + da_z @ w_z + (ds if reset_after else ds * r)

    s = h if reset_after else r * h
    dw_h = np.stack([da_r.T @ h, da_z.T @ h, dp.T @ s])
    db_h = None if params.b_h is None else np.stack([da_r, da_z, dp]).sum(axis=1)

    da = np.stack([da_r, da_z, da_n], axis=1)
    db_x = None if params.b_x is None else da.sum(axis=0)
    if params.w_x is None:
        return da.reshape(x.shape), dh, Params(None, dw_h, db_x, db_h)
    dw_x = np.einsum("ngh,ni->ghi", da, x)
    return np.einsum("ngh,ghi->ni", da, params.w_x), dh, Params(dw_x, dw_h, db_x, db_h)


def _project(x, params):
    """W_x x + b_x of all gates, (N, 3, H)."""
    w_x, hidden = params.w_x, params.w_h.shape[1]
    if w_x is None:
        expect(x.shape[1] == 3 * hidden, "gru_cell.forward: x.shape", x.shape, f"(N, 3 H = {3 * hidden}): w_x is None")
    a = x.reshape(len(x), 3, hidden) if w_x is None else np.einsum("ni,ghi->ngh", x, w_x)
    return a if params.b_x is None else a + params.b_x


def _bias(b_h):
    return (0, 0, 0) if b_h is None else b_h


def example(draw):
    batch, inputs, hidden = draw.size("N", high=3), draw.size("I", high=3), draw.size("H", high=3)
    params = draw.like(init(draw.rng, inputs, hidden, bias=draw.choice("bias", True, False)))
    if draw.choice("projected", False, False, True):
        inputs, params = 3 * hidden, params._replace(w_x=None)
    if draw.choice("one bias", False, True):
        params = params._replace(b_h=None)
    options = {
        "reset_after": draw.choice("reset_after", True, False),
        "z_weighs": draw.choice("z_weighs", "old", "new"),
    }
    args = draw.array(batch, inputs), draw.array(batch, hidden), params
    return Call(tree_map(lambda a: a / 8, args), options)  # a saturated gate hides mistakes


ABOUT = About(laws=("batch_independent",), witnesses=("authors' code", "framework", "definition", "relation"))
