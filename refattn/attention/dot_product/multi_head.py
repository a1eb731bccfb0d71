r"""Multi-head attention.

Several heads attend at once, each to its own linear views of queries, keys and values; a last linear map joins them.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.2.2.

Shapes
    B items, Q queries of E features, K keys of F features and as many values of G features (torch: embed_dim,
    kdim, vdim), H heads. All heads together have P features to compare and V to pass on; O features come out.

Forward, for every head h, which has the h-th P/H (or V/H) of the projected features
    qh = Wq q + bq,   kh = Wk k + bk,   vh = Wv v + bv
    yh = scaled_dot_product(qh, kh, vh)
    y  = Wo [y1 ... yH] + bo

Backward, with a bar for "gradient of the loss with respect to"
    [y1bar ... yHbar]  = Wo^T ybar            and Wobar, bobar: see linear
    qhbar, khbar, vhbar = the backward of scaled_dot_product
    qbar = Wq^T [q1bar ... qHbar], and so on

Choices
    Self-attention is forward(x, x, x, ...); then the gradient of x is the sum of the three. Biases are optional.
    Three kinds of mask, which must all agree: mask[b, h, i, j] and key_mask[b, j] are True where the key takes
    part, and is_causal is as in scaled_dot_product. torch's boolean masks are True where the key is left out.
    torch packs Wq, Wk and Wv into in_proj_weight, one below the other. Keras keeps W as (in, heads, features).
    The weights are in Saved.attn, one map per head; torch returns their mean, attn.mean(axis=1).
    A query that may attend to nothing gets bo. torch: the same, but NaN if it is asked for the weights.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import scaled_dot_product
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import linear


class Params(NamedTuple):
    q: Shaped[linear.Params, "I=E O=P"]
    k: Shaped[linear.Params, "I=F O=P"]
    v: Shaped[linear.Params, "I=G O=V"]
    out: Shaped[linear.Params, "I=V O=O"]


class Saved(NamedTuple):
    q: linear.Saved
    k: linear.Saved
    v: linear.Saved
    heads: scaled_dot_product.Saved
    attn: Shaped[Array, "B H Q K"]
    out: linear.Saved


def init(rng, features, *, key_features=None, value_features=None, bias=True):
    """Each projection as linear.init starts it, all of them to `features`."""
    inputs = features, key_features or features, value_features or features, features
    return Params(*(linear.init(rng, size, features, bias) for size in inputs))


@shaped
def forward(
    q: Shaped[Array, "B Q E"],
    k: Shaped[Array, "B K F"],
    v: Shaped[Array, "B K G"],
    params: Params,
    *,
    heads: int,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    key_mask: Shaped[Bools, "B K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B Q O"], Saved]:
    _check(heads, params, mask)
    allowed = np.ones((q.shape[0], heads, q.shape[1], k.shape[1]), bool)
    if mask is not None:
        allowed &= mask
    if key_mask is not None:
        allowed &= key_mask[:, None, None, :]
    projected_q, saved_q = linear.forward(q, params.q)
    projected_k, saved_k = linear.forward(k, params.k)
    projected_v, saved_v = linear.forward(v, params.v)
    y, saved_heads = scaled_dot_product.forward(
        *(_split(x, heads) for x in (projected_q, projected_k, projected_v)), mask=allowed, is_causal=is_causal
    )
    out, saved_out = linear.forward(_join(y), params.out)
    return out, Saved(saved_q, saved_k, saved_v, saved_heads, saved_heads.attn, saved_out)


@shaped
def backward(
    dy: Shaped[Array, "B Q O"], saved: Saved
) -> tuple[Shaped[Array, "B Q E"], Shaped[Array, "B K F"], Shaped[Array, "B K G"], Params]:
    heads = saved.attn.shape[1]
    djoined, dout = linear.backward(dy, saved.out)
    dheads = scaled_dot_product.backward(_split(djoined, heads), saved.heads)
    dq, dparams_q = linear.backward(_join(dheads[0]), saved.q)
    dk, dparams_k = linear.backward(_join(dheads[1]), saved.k)
    dv, dparams_v = linear.backward(_join(dheads[2]), saved.v)
    return dq, dk, dv, Params(dparams_q, dparams_k, dparams_v, dout)


def _split(x, heads):
    """(B, T, H D) to (B, H, T, D)."""
    b, t, features = x.shape
    return x.reshape(b, t, heads, features // heads).swapaxes(1, 2)


def _join(x):
    """(B, H, T, D) to (B, T, H D)."""
    b, heads, t, features = x.shape
    return x.swapaxes(1, 2).reshape(b, t, heads * features)


def _check(heads, params, mask):
    where = "multi_head.forward:"
    expect(isinstance(heads, (int, np.integer)) and heads > 0, f"{where} heads", heads, "a positive int")
    for name, weight in (("q", params.q.weight), ("v", params.v.weight)):
        features = weight.shape[0]
        expect(features % heads == 0, f"{where} heads", heads, f"a divisor of {features}, from params.{name}.weight")
    if mask is not None:
        expect(mask.shape[1] == heads, f"{where} mask.shape", mask.shape, f"{heads} heads, one mask for each")


def example(draw):
    heads = draw.choice("heads", 1, 2, 3)
    compared, passed = heads * draw.size("P / heads", high=2), heads * draw.size("V / heads", high=2)
    b, queries, keys = draw.size("B", high=2), draw.size("Q", high=3), draw.size("K", high=3)
    e, f, g, o = (draw.size(letter, high=3) for letter in "EFGO")
    biases = [draw.choice(f"bias of {name}", True, False) for name in Params._fields]
    sizes = (e, compared), (f, compared), (g, passed), (passed, o)
    params = Params(*(linear.init(draw.rng, *size, bias) for size, bias in zip(sizes, biases)))
    options = {
        "heads": heads,
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
