r"""Grouped-query attention.

Several heads of queries share one head of keys and values, which a cache then has to hold only once.

Paper: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
EMNLP 2023 (arXiv:2305.13245). All queries on one head, multi-query attention: Shazeer, "Fast Transformer Decoding: One
Write-Head is All You Need", 2019 (arXiv:1911.02150).

Shapes
    B items, H heads of queries, G heads of keys and values, Q queries, K keys, D features of a query or key, E features
    of a value. H is a multiple of G.

Forward, where the R = H / G query heads h with group(h) = g are stacked: R Q queries of head g, one after the other
    S_h = scale Q_h K_g^T
    P_h = softmax(S_h)
    Y_h = P_h V_g                             scaled_dot_product of G heads, and unstacked again

Backward, with a bar for "gradient of the loss with respect to"
    Qbar_h, Kbar_g, Vbar_g = the backward of scaled_dot_product, of the stacked Ybar_h
    So the gradients of keys and values are sums over the R heads that share them.

Choices
    order says which heads share. "repeat_interleave": group(h) = h // R, neighbours share, as nearly everywhere;
    "tile": group(h) = h % G, as x-transformers and onnx 1.18, which is the other with the query heads reordered.
    G = 1 is multi-query attention, G = H is scaled_dot_product.
    mask and is_causal are as there: mask has one entry for each score, so H heads. grouped_query_layer has projections.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import scaled_dot_product
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    stacked: scaled_dot_product.Saved
    attn: Shaped[Array, "B H Q K"]
    order: str


@shaped
def forward(
    q: Shaped[Array, "B H Q D"],
    k: Shaped[Array, "B G K D"],
    v: Shaped[Array, "B G K E"],
    *,
    order: str = "repeat_interleave",
    scale: float | None = None,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B H Q E"], Saved]:
    (batch, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    shares = groups > 0 and heads % groups == 0
    expect(shares, "grouped_query.forward: k.shape", k.shape, f"a divisor of H = {heads} heads")
    orders = "repeat_interleave", "tile"
    expect(order in orders, "grouped_query.forward: order", order, f"one of {', '.join(orders)}")
    allowed = np.ones((batch, heads, queries, keys), bool) if mask is None else mask
    if is_causal:  # here, where queries still have their own positions
        allowed = allowed & np.tri(queries, keys, dtype=bool)
    y, stacked = scaled_dot_product.forward(
        _stack(q, groups, order), k, v, scale=scale, mask=_stack(allowed, groups, order)
    )
    attn = _unstack(stacked.attn, heads, order)
    return _unstack(y, heads, order), Saved(stacked, attn, order)


@shaped
def backward(
    dy: Shaped[Array, "B H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B H Q D"], Shaped[Array, "B G K D"], Shaped[Array, "B G K E"]]:
    stacked, attn, order = saved
    dq, dk, dv = scaled_dot_product.backward(_stack(dy, stacked.k.shape[1], order), stacked)
    return _unstack(dq, attn.shape[1], order), dk, dv


def _stack(x, groups, order):
    """(B, H, Q, D) to (B, G, R Q, D): the queries of all the heads that share."""
    batch, heads, queries, features = x.shape
    if order == "tile":
        x = x.reshape(batch, heads // groups, groups, queries, features).swapaxes(1, 2)
    return x.reshape(batch, groups, heads // groups * queries, features)


def _unstack(x, heads, order):
    """(B, G, R Q, D) to (B, H, Q, D)."""
    batch, groups, stacked, features = x.shape
    shared = heads // groups
    x = x.reshape(batch, groups, shared, stacked // shared, features)
    if order == "tile":
        x = x.swapaxes(1, 2)
    return x.reshape(batch, heads, stacked // shared, features)


def example(draw):
    b, groups = draw.size("B", high=2), draw.size("G", high=3)
    heads = groups * draw.size("H / G", high=3)
    queries, keys, features = draw.size("Q", high=3), draw.size("K", high=3), draw.size("D", high=3)
    q, k = draw.array(b, heads, queries, features), draw.array(b, groups, keys, features)
    options = {
        "order": draw.choice("order", "repeat_interleave", "tile"),
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    return Call((q, k, draw.array(b, groups, keys, draw.size("E", high=3))), options)


ABOUT = About(
    weights="attn",
    laws=(
        "batch_independent",
        "weights_in_unit_interval",
        "weights_sum_to_one",
        "key_permutation_invariant",
        "mask_is_truncation",
        "causal",
    ),
    witnesses=("framework", "definition"),
)
