r"""Luong's alignment scores: how well a decoder and an encoder state match.

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

Backward, with a bar for "gradient of the loss with respect to"; each sum is over the letters that go away
    gbar = sum ebar_ts u_ts,   ubar_ts = g ebar_ts
    dot, general: k_s is what h_t is multiplied with
        hbar_t = sum ubar_ts k_s,   kbar_s = sum ubar_ts h_t,   and mbar = kbar or through W
    concat, concat_matlab: a_ts is what tanh sees, y_ts = tanh(a_ts)
        vbar = sum ubar_ts y_ts,    abar_ts = ubar_ts v (1 - y_ts^2)
        concat:         [hbar; mbar]_ts = W' abar_ts,   then hbar_t = sum over s, mbar_s = sum over t
        concat_matlab:  hbar_t = W' sum abar_ts,   mbar_s = sum abar_ts
    Wbar, bbar as in linear

Choices
    b and g are not in the paper: b=None leaves b out (the PyTorch chatbot tutorial has it), scale=None leaves g out
    (TensorFlow Addons' scale=True has it). concat is the paper's; the authors' MATLAB code calls concat_matlab so,
    whose encoder states have no weight. That code writes general as m_s . W h_t: its W is the transpose of this one.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import linear


class Params(NamedTuple):
    weight: Shaped[Array, "I J"] | None = None
    bias: Shaped[Array, "I"] | None = None
    v: Shaped[Array, "I"] | None = None
    scale: Shaped[Array, ""] | None = None


class Saved(NamedTuple):
    query: Shaped[Array, "N T Q"]
    key: Shaped[Array, "N S Q"] | None  # of dot and general: m, or W m + b
    hidden: Shaped[Array, "N T S I"] | None  # of the two concats: tanh(...)
    u: Shaped[Array, "N T S"]
    mapped: linear.Saved | None
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
    w, key, hidden, mapped = linear.Params(params.weight, params.bias), None, None, None
    if score in ("dot", "general"):
        key, mapped = (memory, None) if score == "dot" else linear.forward(memory, w)
        u = query @ key.swapaxes(1, 2)
    else:
        if score == "concat":
            a, mapped = linear.forward(_pairs(query, memory), w)
        else:
            of_query, mapped = linear.forward(query, w)
            a = of_query[:, :, None] + memory[:, None]
        hidden = np.tanh(a)
        u = hidden @ params.v
    e = u if params.scale is None else params.scale * u
    return e, Saved(query, key, hidden, u, mapped, params, score)


@shaped
def backward(
    de: Shaped[Array, "N T S"], saved: Saved
) -> tuple[Shaped[Array, "N T Q"], Shaped[Array, "N S K"], Params]:
    query, key, hidden, u, mapped, (_, _, v, scale), score = saved
    dscale = None if scale is None else (de * u).sum()
    du = de if scale is None else scale * de
    dw, dv = linear.Params(None, None), None
    if score in ("dot", "general"):
        dquery, dmemory = du @ key, du.swapaxes(1, 2) @ query
        if score == "general":
            dmemory, dw = linear.backward(dmemory, mapped)
    else:
        dv = (du[..., None] * hidden).sum(axis=(0, 1, 2))
        da = du[..., None] * v * (1 - hidden * hidden)
        if score == "concat":
            dpairs, dw = linear.backward(da, mapped)
            dquery, dmemory = np.split(dpairs, [query.shape[2]], axis=3)
            dquery, dmemory = dquery.sum(axis=2), dmemory.sum(axis=1)
        else:
            dmemory = da.sum(axis=1)
            dquery, dw = linear.backward(da.sum(axis=2), mapped)
    return dquery, dmemory, Params(*dw, dv, dscale)


def _pairs(query, memory):
    """[h_t; m_s] for all t and s, (N, T, S, Q + K)."""
    of_query = np.repeat(query[:, :, None], memory.shape[1], axis=2)
    of_memory = np.repeat(memory[:, None], query.shape[1], axis=1)
    return np.concatenate([of_query, of_memory], axis=3)


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
    n, t, s = draw.size("N", high=3), draw.size("T", high=2), draw.size("S")
    args = draw.array(n, t, query), draw.array(n, s, memory), params
    return Call(tree_map(lambda x: x / 8, args), {"score": score})  # a saturated tanh has no accurate slope


ABOUT = About(laws=("batch_independent",), witnesses=("definition",))
