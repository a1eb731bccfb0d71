r"""Additive attention.

A small network with one hidden layer scores every encoder state against the decoder state; the context is their mean,
weighted by the softmax of the scores.

Paper: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015
(arXiv:1409.0473), section 3.1 and appendix A.1.2.

Shapes
    N sentences, T decoder states s_t of length Q, S encoder states h_j of length K, A alignment units.

Forward
    y_ntj = tanh(W s_nt + b_w + U h_nj + b_u)          the hidden layer
    e_ntj = v . y_ntj + b                              scores;  g v / |v| for v where g is given
    p_ntj = softmax over j of e_ntj                    alignment weights, over the states that mask allows
    c_nt  = sum_j p_ntj h_nj                           context

Backward, with a bar for "gradient of the loss with respect to"
    pbar_ntj = cbar_nt . h_nj, plus what comes in through the weights, which are an output too
    ebar     = p (pbar - sum_j pbar p)                 softmax
    bbar     = 0                                       softmax does not see a constant
    vbar     = sum_ntj ebar y
    abar     = ebar v (1 - y^2)                        a is what tanh sees
    sbar_nt  = (sum_j abar) W;   Wbar, b_wbar as in linear
    hbar_nj  = (sum_t abar) U + sum_t p cbar;   Ubar, b_ubar as in linear           h is compared, and averaged
    where g is given and r is the vbar above:
    gbar = r . v / |v|,   vbar = g / |v| (r - v gbar / |v|)

Choices
    The query is the decoder state before the step, s_i-1 in the paper. The authors' code has no biases here; the
    PyTorch tutorial has all three. TensorFlow Addons has none, but normalize=True brings g and one bias: b_w here.
    What is masked gets weight 0 and gradient 0; NaN and inf in it show, as they are multiplied by 0. A sentence without
    any allowed state has context 0 and weights 0: the authors' code, which multiplies by the mask after e^score and
    subtracts no maximum, has 0/0 there, and TensorFlow Addons spreads the weights evenly over states it has set to 0.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import linear, softmax


class Params(NamedTuple):
    w: Shaped[linear.Params, "O=A I=Q"]
    u: Shaped[linear.Params, "O=A I=K"]
    v: Shaped[Array, "A"]
    b: Shaped[Array, ""] | None = None
    g: Shaped[Array, ""] | None = None


class Out(NamedTuple):
    context: Shaped[Array, "N T K"]
    weights: Shaped[Array, "N T S"]


class Saved(NamedTuple):
    memory: Shaped[Array, "N S K"]
    hidden: Shaped[Array, "N T S A"]
    weights: Shaped[Array, "N T S"]
    of_query: linear.Saved
    of_memory: linear.Saved
    normalised: softmax.Saved
    params: Params


def init(rng, query, memory, units, *, bias=False, normalize=False):
    """Normal weights of variance 1 / inputs, zero biases, g = sqrt(1 / units)."""
    return Params(
        w=linear.init(rng, query, units, bias or normalize),
        u=linear.init(rng, memory, units, bias),
        v=rng.normal(size=units) / math.sqrt(units),
        b=np.zeros(()) if bias else None,
        g=np.full((), math.sqrt(1 / units)) if normalize else None,
    )


@shaped
def forward(
    query: Shaped[Array, "N T Q"],
    memory: Shaped[Array, "N S K"],
    params: Params,
    *,
    mask: Shaped[Bools, "N S"] | None = None,
) -> tuple[Out, Saved]:
    _check(params)
    v = _v(params)
    of_query, saved_query = linear.forward(query, params.w)
    of_memory, saved_memory = linear.forward(memory, params.u)
    hidden = np.tanh(of_query[:, :, None] + of_memory[:, None])
    energy = hidden @ v if params.b is None else hidden @ v + params.b
    allowed = None if mask is None else np.broadcast_to(mask[:, None], energy.shape)
    weights, normalised = softmax.forward(energy, mask=allowed)
    saved = Saved(memory, hidden, weights, saved_query, saved_memory, normalised, params)
    return Out(weights @ memory, weights), saved


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Shaped[Array, "N T Q"], Shaped[Array, "N S K"], Params]:
    memory, hidden, weights, of_query, of_memory, normalised, params = saved
    dweights = dout.context @ memory.swapaxes(1, 2) + dout.weights
    (denergy,) = softmax.backward(dweights, normalised)
    db = None if params.b is None else np.zeros_like(params.b)
    dv, dg = np.einsum("ntj,ntja->a", denergy, hidden), None
    da = denergy[..., None] * _v(params) * (1 - hidden * hidden)
    dquery, dw = linear.backward(da.sum(axis=2), of_query)
    dmemory, du = linear.backward(da.sum(axis=1), of_memory)
    if params.g is not None:
        norm = _norm(params.v)
        dg = dv @ params.v / norm
        dv = params.g / norm * (dv - params.v * dg / norm)
    return dquery, dmemory + weights.swapaxes(1, 2) @ dout.context, Params(dw, du, dv, db, dg)


def _v(params):
    """What the hidden layer is weighed by: v, or g v / |v|."""
    return params.v if params.g is None else params.g * params.v / _norm(params.v)


def _norm(v):
    return np.sqrt((v * v).sum())


def _check(params):
    fits = params.g is None or _norm(params.v) != 0
    expect(fits, "additive.forward: params.v", params.v, "a direction, not all zeros, where g is given")


def example(draw):
    n, t, s = draw.size("N", high=3), draw.size("T", high=2), draw.size("S")
    query, memory, units = (draw.size(name, high=3) for name in ("Q", "K", "A"))
    flags = {name: draw.choice(name, True, False) for name in ("bias", "normalize")}
    params = draw.like(init(draw.rng, query, memory, units, **flags))
    if flags["normalize"]:
        params = params._replace(v=params.v + np.copysign(1, params.v))  # |v| has no slope at 0
    mask = draw.mask(n, s) if draw.choice("masked", True, False) else None
    args = draw.array(n, t, query), draw.array(n, s, memory), params
    return Call(tree_map(lambda a: a / 8, args), {"mask": mask})  # a saturated tanh hides mistakes


ABOUT = About(
    weights="weights",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "framework", "definition", "relation"),
)
