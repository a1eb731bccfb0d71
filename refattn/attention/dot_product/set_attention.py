r"""Multihead attention block of the Set Transformer (MAB).

The block that its encoder (SAB, ISAB) and its pooling (PMA) are made of: none of them sees the order of a set.

Paper: Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019
(arXiv:1810.00825), section 3.1.

Shapes
    B items, Q queries of E features, K members of a set, of F features; D features, of all H heads together, come out.

Forward
    Q = Wq q + bq,   K = Wk x + bk,   V = Wv x + bv
    A = Q + [heads joined] of scaled_dot_product(Q, K, V), with the scale 1 / sqrt(D)
    N = norm0(A)                              layer_norm, or nothing
    Y = norm1(N + relu(Wo N + bo))

Backward, with a bar for "gradient of the loss with respect to"
    Sbar = the backward of norm1, of the sum S
    Nbar = Sbar + Wo^T (relu'(Wo N + bo) Sbar)
    Abar = the backward of norm0
    Qbar = Abar + what scaled_dot_product gives it; Kbar, Vbar
    qbar = Wq^T Qbar,   xbar = Wk^T Kbar + Wv^T Vbar

Choices
    SAB(x) is forward(x, x, ...), ISAB(x) is forward(x, forward(I, x, ...), ...) with learned I for every item, and PMA
    is forward(seeds, x, ...): a learned query is np.broadcast_to(seeds, (B, S, E)), its gradient the sum over B.
    Scores are divided by the root of all D features, in the paper as in its code, and not by that of a head's.
    The code adds the projected queries, where the paper has X itself; its row-wise network is one layer, as here; it
    has no norms unless told (ln=True). relu'(0) = 0. key_mask[b, j] is True for a member of the set, False for padding.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import scaled_dot_product
from refattn.attention.dot_product.multi_head import join_heads, split_heads
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.elementwise import relu
from refattn.primitives import layer_norm, linear


class Params(NamedTuple):
    q: Shaped[linear.Params, "I=E O=D"]
    k: Shaped[linear.Params, "I=F O=D"]
    v: Shaped[linear.Params, "I=F O=D"]
    out: Shaped[linear.Params, "I=D O=D"]
    norm0: layer_norm.Params | None = None
    norm1: layer_norm.Params | None = None


class Saved(NamedTuple):
    q: linear.Saved
    k: linear.Saved
    v: linear.Saved
    heads: scaled_dot_product.Saved
    attn: Shaped[Array, "B H Q K"]
    norm0: layer_norm.Saved | None
    out: linear.Saved
    opening: Shaped[Array, "B Q D"]  # what relu gets
    norm1: layer_norm.Saved | None


def init(rng, features, *, query_features=None, set_features=None, norm=False):
    """Each projection as linear.init starts it, to `features`; the norms as layer_norm.init."""
    e, f = query_features or features, set_features or features
    projections = (linear.init(rng, size, features) for size in (e, f, f, features))
    return Params(*projections, *(layer_norm.init(rng, features) for _ in range(2 * norm)))


@shaped
def forward(
    q: Shaped[Array, "B Q E"],
    x: Shaped[Array, "B K F"],
    params: Params,
    *,
    heads: int,
    key_mask: Shaped[Bools, "B K"] | None = None,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "B Q D"], Saved]:
    features = params.q.weight.shape[0]
    fits = isinstance(heads, (int, np.integer)) and heads > 0 and features % heads == 0
    expect(fits, "set_attention.forward: heads", heads, f"a divisor of D = {features}")
    projected_q, saved_q = linear.forward(q, params.q)
    projected_k, saved_k = linear.forward(x, params.k)
    projected_v, saved_v = linear.forward(x, params.v)
    split = (split_heads(y, heads) for y in (projected_q, projected_k, projected_v))
    mask = (
        None if key_mask is None else np.broadcast_to(key_mask[:, None, None], (len(q), heads, q.shape[1], x.shape[1]))
    )
    attended, saved_heads = scaled_dot_product.forward(*split, scale=1 / math.sqrt(features), mask=mask)
    n, saved_norm0 = _normalise(projected_q + join_heads(attended), params.norm0, eps)
    opening, saved_out = linear.forward(n, params.out)
    y, saved_norm1 = _normalise(n + relu(opening), params.norm1, eps)
    attention = saved_q, saved_k, saved_v, saved_heads, saved_heads.attn
    return y, Saved(*attention, saved_norm0, saved_out, opening, saved_norm1)


@shaped
def backward(dy: Shaped[Array, "B Q D"], saved: Saved) -> tuple[Shaped[Array, "B Q E"], Shaped[Array, "B K F"], Params]:
    dsum, dnorm1 = _unnormalise(dy, saved.norm1)
    dn, dout = linear.backward((saved.opening.real > 0) * dsum, saved.out)
    da, dnorm0 = _unnormalise(dsum + dn, saved.norm0)
    dheads = scaled_dot_product.backward(split_heads(da, saved.attn.shape[1]), saved.heads)
    dq, dk, dv = (join_heads(d) for d in dheads)
    dq, dparams_q = linear.backward(da + dq, saved.q)
    dx_of_keys, dparams_k = linear.backward(dk, saved.k)
    dx_of_values, dparams_v = linear.backward(dv, saved.v)
    return dq, dx_of_keys + dx_of_values, Params(dparams_q, dparams_k, dparams_v, dout, dnorm0, dnorm1)


def _normalise(x, params, eps):
    return (x, None) if params is None else layer_norm.forward(x, params, eps=eps)


def _unnormalise(dy, saved):
    return (dy, None) if saved is None else layer_norm.backward(dy, saved)


def example(draw):
    heads = draw.choice("heads", 1, 2, 3)
    features, b = heads * draw.size("D / heads", high=2), draw.size("B", high=2)
    e, f = draw.size("E", high=3), draw.size("F", high=3)
    params = draw.like(init(draw.rng, features, query_features=e, set_features=f, norm=True))
    params = params._replace(
        norm0=draw.choice("norm0", params.norm0, None), norm1=draw.choice("norm1", params.norm1, None)
    )
    if draw.choice("bias", True, False) is False:
        params = Params(*(linear.Params(p.weight) for p in params[:4]), *params[4:])
    members = draw.size("K", high=3)
    options = {
        "heads": heads,
        "key_mask": draw.mask(b, members) if draw.choice("padded", False, True) else None,
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    return Call((draw.array(b, draw.size("Q", high=3), e), draw.array(b, members, f), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "key_permutation_invariant"),
    witnesses=("definition", "relation"),
)
