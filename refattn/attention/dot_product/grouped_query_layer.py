r"""Grouped-query and multi-query attention, with projections.

Multi-head attention with fewer heads of keys and values than of queries; with one, it is multi-query attention.

Paper: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
EMNLP 2023 (arXiv:2305.13245), section 2; with key_heads=1 Shazeer, "Fast Transformer Decoding: One Write-Head is All
You Need", 2019 (arXiv:1911.02150), section 3.

Shapes
    B items, Q queries of E features, K keys of F features and as many values of G features; O features come out. P
    features of all query heads together, R of all key heads, V of all value heads, U = heads V / key_heads are joined.

Forward, where a head has D = P / heads = R / key_heads features to compare
    Q = Wq q + bq,   K = Wk k + bk,   V = Wv v + bv
    Y = grouped_query(Q, K, V)                of `heads` heads and of `key_heads`
    y = Wo Y + bo

Backward, with a bar for "gradient of the loss with respect to"
    Ybar = Wo^T ybar                          and Wobar, bobar: see linear
    Qbar, Kbar, Vbar = the backward of grouped_query
    qbar = Wq^T Qbar, and so on

Choices
    key_heads=heads is multi_head; from_multi_head makes fewer key heads out of many by their mean, as the paper does.
    Masks are those of multi_head, the heads that share those of grouped_query with its default order; the other order
    is this one with the query heads reordered, that is the rows of Wq and the columns of Wo.
    Biases are optional: Llama has none, Qwen2 has bq, bk and bv.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import grouped_query
from refattn.attention.dot_product.multi_head import join_heads, split_heads
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import linear


class Params(NamedTuple):
    q: Shaped[linear.Params, "I=E O=P"]
    k: Shaped[linear.Params, "I=F O=R"]
    v: Shaped[linear.Params, "I=G O=V"]
    out: Shaped[linear.Params, "I=U O=O"]


class Saved(NamedTuple):
    q: linear.Saved
    k: linear.Saved
    v: linear.Saved
    groups: grouped_query.Saved
    attn: Shaped[Array, "B H Q K"]
    out: linear.Saved


def init(rng, features, heads, key_heads, *, key_features=None, value_features=None, bias=False):
    """Each projection as linear.init starts it, from `features` and to as many."""
    shared = features // heads * key_heads
    sizes = (features, features), (key_features or features, shared), (value_features or features, shared)
    return Params(*(linear.init(rng, *size, bias) for size in (*sizes, (features, features))))


def from_multi_head(params, heads, key_heads):
    """Params with the mean of every group of key heads and of value heads (section 2.1)."""

    def mean(x):
        of_groups = x.reshape(key_heads, heads // key_heads, -1, *x.shape[1:])
        return of_groups.mean(axis=1).reshape(-1, *x.shape[1:])

    k, v = (linear.Params(mean(p.weight), None if p.bias is None else mean(p.bias)) for p in (params.k, params.v))
    return Params(params.q, k, v, params.out)


@shaped
def forward(
    q: Shaped[Array, "B Q E"],
    k: Shaped[Array, "B K F"],
    v: Shaped[Array, "B K G"],
    params: Params,
    *,
    heads: int,
    key_heads: int,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    key_mask: Shaped[Bools, "B K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B Q O"], Saved]:
    _check(heads, key_heads, params, mask)
    projected_q, saved_q = linear.forward(q, params.q)
    projected_k, saved_k = linear.forward(k, params.k)
    projected_v, saved_v = linear.forward(v, params.v)
    allowed = np.ones((q.shape[0], heads, q.shape[1], k.shape[1]), bool)
    if mask is not None:
        allowed &= mask
    if key_mask is not None:
        allowed &= key_mask[:, None, None, :]
    y, saved_groups = grouped_query.forward(
        split_heads(projected_q, heads),
        split_heads(projected_k, key_heads),
        split_heads(projected_v, key_heads),
        mask=allowed,
        is_causal=is_causal,
    )
    out, saved_out = linear.forward(join_heads(y), params.out)
    return out, Saved(saved_q, saved_k, saved_v, saved_groups, saved_groups.attn, saved_out)


@shaped
def backward(
    dy: Shaped[Array, "B Q O"], saved: Saved
) -> tuple[Shaped[Array, "B Q E"], Shaped[Array, "B K F"], Shaped[Array, "B K G"], Params]:
    djoined, dout = linear.backward(dy, saved.out)
    dq, dk, dv = grouped_query.backward(split_heads(djoined, saved.attn.shape[1]), saved.groups)
    dq, dparams_q = linear.backward(join_heads(dq), saved.q)
    dk, dparams_k = linear.backward(join_heads(dk), saved.k)
    dv, dparams_v = linear.backward(join_heads(dv), saved.v)
    return dq, dk, dv, Params(dparams_q, dparams_k, dparams_v, dout)


def _check(heads, key_heads, params, mask):
    where = "grouped_query_layer.forward:"
    for name, count in (("heads", heads), ("key_heads", key_heads)):
        expect(isinstance(count, (int, np.integer)) and count > 0, f"{where} {name}", count, "a positive int")
    expect(heads % key_heads == 0, f"{where} key_heads", key_heads, f"a divisor of heads = {heads}")
    q, k, v, out = (projection.weight.shape for projection in params)
    expect(q[0] % heads == 0, f"{where} heads", heads, f"a divisor of {q[0]}, from params.q.weight")
    features = q[0] // heads
    expect(k[0] == features * key_heads, f"{where} params.k.weight.shape", k, f"({key_heads} heads of {features}, F)")
    expect(v[0] % key_heads == 0, f"{where} key_heads", key_heads, f"a divisor of {v[0]}, from params.v.weight")
    joined = v[0] // key_heads * heads
    expect(out[1] == joined, f"{where} params.out.weight.shape", out, f"(O, {joined}), of all heads joined")
    if mask is not None:
        expect(mask.shape[1] == heads, f"{where} mask.shape", mask.shape, f"{heads} heads, one mask for each")


def example(draw):
    key_heads = draw.choice("key_heads", 1, 2)
    heads = key_heads * draw.size("heads / key_heads", high=3)
    compared, passed = draw.size("D", high=2), draw.size("V / key_heads", high=2)
    b, queries, keys = draw.size("B", high=2), draw.size("Q", high=3), draw.size("K", high=3)
    e, f, g, o = (draw.size(letter, high=3) for letter in "EFGO")
    sizes = (e, heads * compared), (f, key_heads * compared), (g, key_heads * passed), (heads * passed, o)
    biases = [draw.choice(f"bias of {name}", True, False) for name in Params._fields]
    params = Params(*(linear.init(draw.rng, *size, bias) for size, bias in zip(sizes, biases)))
    options = {
        "heads": heads,
        "key_heads": key_heads,
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, keys) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    return Call((draw.array(b, queries, e), draw.array(b, keys, f), draw.array(b, keys, g), draw.like(params)), options)


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
    witnesses=("framework", "definition", "relation"),
)
