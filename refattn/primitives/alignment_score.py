r"""Alignment score: how well a decoder state and an encoder state match, as Luong, Pham and Manning measure it.

Paper: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015
(arXiv:1508.04025), section 3.1.

Shapes
    N sentences, T decoder states h_t of length Q, S encoder states m_s of length K, I rows and J columns of W.

Forward
    dot            u_ts = h_t . m_s                      Q = K
    general        u_ts = h_t . (W m_s + b)              I = Q, J = K
    concat         u_ts = v . tanh(W [h_t; m_s] + b)     J = Q + K, any I
    concat_matlab  u_ts = v . tanh(W h_t + b + m_s)      I = K, J = Q
    e_ts = g u_ts

Backward, with a bar for "gradient of the loss with respect to"; every line sums over the letters on its right only
    gbar = ebar u,   ubar = g ebar
    dot, general: with W = 1 and b = 0 for dot
        hbar_t = sum_s ubar_ts (W m_s + b),   mbar_s = sum_t ubar_ts (W' h_t)
        Wbar   = sum_ts ubar_ts h_t m_s',     bbar   = sum_ts ubar_ts h_t
    concat, concat_matlab: with a_ts the argument of tanh
        vbar   = sum_ts ubar_ts tanh(a_ts),   abar_ts = ubar_ts v (1 - tanh(a_ts)^2),   bbar = sum_ts abar_ts
        from h_t: sum_s abar_ts, and from m_s: sum_t abar_ts, each through its columns of W

Choices
    b and g are not in the paper: b=None leaves b out (the PyTorch chatbot tutorial has it), scale=None leaves g out
    (TensorFlow Addons' scale=True has it). concat is the paper's; the authors' MATLAB code calls concat_matlab so,
    whose encoder states have no weight. That code writes general as m_s . W h_t: its W is the transpose of this one.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Params(NamedTuple):
    weight: Shaped[Array, "I J"] | None = None
    bias: Shaped[Array, "I"] | None = None
    v: Shaped[Array, "I"] | None = None
    scale: Shaped[Array, ""] | None = None


class Saved(NamedTuple):
    query: Shaped[Array, "N T Q"]
    memory: Shaped[Array, "N S K"]
    hidden: Shaped[Array, "N T S I"] | None  # tanh(a), of the two concats
    u: Shaped[Array, "N T S"]
    params: Params
    score: str


SCORES = ("dot", "general", "concat", "concat_matlab")


def init(rng, query, memory, *, score="general", hidden=None, bias=False, scale=False):
    """Normal weights of variance 1 / columns, v of variance 1 / rows, zero bias, scale 1."""
    shape = {"dot": None, "general": (query, memory), "concat": (hidden or query, query + memory)}
    shape = (shape | {"concat_matlab": (memory, query)})[score]
    return Params(
        weight=None if shape is None else rng.normal(size=shape) / math.sqrt(shape[1]),
        bias=np.zeros(shape[0]) if shape and bias else None,
        v=rng.normal(size=shape[0]) / math.sqrt(shape[0]) if "concat" in score else None,
        scale=np.ones(()) if scale else None,
    )


@shaped
def forward(
    query: Shaped[Array, "N T Q"], memory: Shaped[Array, "N S K"], params: Params, *, score: str = "general"
) -> tuple[Shaped[Array, "N T S"], Saved]:
    _check(query, memory, params, score)
    weight, bias, v, scale = params
    hidden = None
    if score in ("dot", "general"):
        u = (query if weight is None else query @ weight) @ memory.swapaxes(1, 2)
        if bias is not None:
            u = u + (query @ bias)[:, :, None]
    else:
        of_query, of_memory = _columns(weight, query, score)
        a = (query @ of_query.T)[:, :, None] + (memory if of_memory is None else memory @ of_memory.T)[:, None]
        hidden = np.tanh(a if bias is None else a + bias)
        u = hidden @ v
    return (u if scale is None else scale * u), Saved(query, memory, hidden, u, params, score)


@shaped
def backward(
    de: Shaped[Array, "N T S"], saved: Saved
) -> tuple[Shaped[Array, "N T Q"], Shaped[Array, "N S K"], Params]:
    query, memory, hidden, u, (weight, bias, v, scale), score = saved
    dscale = None if scale is None else (de * u).sum()
    du = de if scale is None else scale * de
    dweight = dbias = dv = None
    if score in ("dot", "general"):
        dprojected = du @ memory  # of h_t W
        dmemory = du.swapaxes(1, 2) @ (query if weight is None else query @ weight)
        dquery = dprojected if weight is None else dprojected @ weight.T
        if weight is not None:
            dweight = _over_rows(query, dprojected)
        if bias is not None:
            dquery = dquery + du.sum(axis=2)[:, :, None] * bias
            dbias = (du.sum(axis=2)[:, :, None] * query).sum(axis=(0, 1))
    else:
        of_query, of_memory = _columns(weight, query, score)
        dv = (du[..., None] * hidden).sum(axis=(0, 1, 2))
        da = du[..., None] * v * (1 - hidden * hidden)
        da_query, da_memory = da.sum(axis=2), da.sum(axis=1)
        dquery, dmemory = da_query @ of_query, da_memory
        dweight = _over_rows(da_query, query)
        if of_memory is not None:
            dmemory = da_memory @ of_memory
            dweight = np.concatenate([dweight, _over_rows(da_memory, memory)], axis=1)
        dbias = None if bias is None else da.sum(axis=(0, 1, 2))
    return dquery, dmemory, Params(dweight, dbias, dv, dscale)


def _columns(weight, query, score):
    """The columns of W that meet the decoder state, and those that meet the encoder state."""
    q = query.shape[2]
    return (weight[:, :q], weight[:, q:]) if score == "concat" else (weight, None)


def _over_rows(a, b):
    """The sum of the outer products of the rows of a and b."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _check(query, memory, params, score):
    where, (q, k) = "alignment_score.forward:", (query.shape[2], memory.shape[2])
    expect(score in SCORES, f"{where} score", score, f"one of {SCORES}")
    given = [name for name, value in params._asdict().items() if value is not None]
    needed = {"dot": [], "general": ["weight"]}.get(score, ["weight", "v"])
    extra = ["scale"] if score == "dot" else ["bias", "scale"]
    fits = set(needed) <= set(given) <= {*needed, *extra}
    expect(fits, f"{where} params given", given, f"{needed} for score={score!r}, and perhaps some of {extra}")
    if score == "dot":
        expect(q == k, f"{where} memory.shape", memory.shape, f"K = Q = {q} for score='dot', from query")
    else:
        rows, columns = {"general": (q, k), "concat": (len(params.weight), q + k), "concat_matlab": (k, q)}[score]
        shape = params.weight.shape
        expect(shape == (rows, columns), f"{where} params.weight.shape", shape, f"({rows}, {columns}) for {score!r}")


def example(draw):
    score, query = draw.choice("score", *SCORES), draw.size("Q", high=3)
    memory = query if score == "dot" else draw.size("K", high=3)
    flags = {name: draw.choice(name, True, False) for name in ("bias", "scale")}
    params = draw.like(init(draw.rng, query, memory, score=score, hidden=draw.size("I", high=3), **flags))
    lengths = draw.size("N", high=3), draw.size("T", high=2), draw.size("S")
    return Call(
        (draw.array(lengths[0], lengths[1], query), draw.array(lengths[0], lengths[2], memory), params),
        {"score": score},
    )


ABOUT = About(laws=("batch_independent",), witnesses=("definition",))
