r"""Gated attention output.

A sigmoid of the query's own token decides how much of what every head, or every feature of it, found is passed on.

Paper: Qiu et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
NeurIPS 2025 (arXiv:2505.06708), section 2.2, position G1, the one it recommends.

Shapes
    B items, Q queries of E features, K keys of F features and as many values of G features, H heads of V features to
    pass on, all together; O features come out. The gate has M numbers: V, one a feature, or H, one a head.

Forward
    Z = multi_head(q, k, v)                   without its last projection
    g = sigmoid(W_g q + b_g)
    y = W_o (g Z) + b_o                       of one number a head, every feature of the head gets it

Backward, with a bar for "gradient of the loss with respect to"
    Gbar = W_o^T ybar, of g Z                 and W_obar, b_obar: see linear
    Zbar = g Gbar,   gbar = Z Gbar            summed over the head where it has one number
    q, k and v get the backward of multi_head from Zbar, and q that of the gate too: W_g^T (g (1 - g) gbar)

Choices
    The gate is elementwise or per head by its number of rows. It is made of the query's token, as in the paper, in
    Keras's GroupedQueryAttention and in timm; x-transformers can make it of other things.
    params.attention is multi_head.Params, of which the last projection comes after the gate here.
    Masks are those of multi_head. A query that may attend to nothing gets b_o.
    In self-attention, forward(x, x, x, ...), the gradient of x is the sum of the three.
"""

from typing import NamedTuple

from refattn.attention.dot_product import multi_head
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.elementwise import sigmoid
from refattn.primitives import linear


class Params(NamedTuple):
    attention: Shaped[multi_head.Params, "E=E F=F G=G V=V O=O"]
    gate: Shaped[linear.Params, "I=E O=M"]


class Saved(NamedTuple):
    heads: multi_head.Saved
    attn: Shaped[Array, "B H Q A"]
    z: Shaped[Array, "B Q V"]
    g: Shaped[Array, "B Q M"]
    gate: linear.Saved
    out: linear.Saved


def init(rng, features, heads=None, *, bias=True):
    """multi_head.init, and a gate as linear.init starts it: one number a head if `heads` is given, else a feature."""
    return Params(multi_head.init(rng, features, bias=bias), linear.init(rng, features, heads or features, False))


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
    attention, gates = params.attention, len(params.gate.weight)
    expect(attention.out is not None, "gated.forward: params.attention.out", None, "the last projection")
    passed = attention.out.weight.shape[1]
    fits = gates in (heads, passed)
    expect(fits, "gated.forward: params.gate.weight.shape", params.gate.weight.shape, f"({heads} or {passed}, E)")
    z, saved_heads = multi_head.forward(
        q, k, v, attention._replace(out=None), heads=heads, mask=mask, key_mask=key_mask, is_causal=is_causal
    )
    opening, saved_gate = linear.forward(q, params.gate)
    g = sigmoid(opening)
    y, saved_out = linear.forward(_for_features(g, passed) * z, attention.out)
    return y, Saved(saved_heads, saved_heads.attn, z, g, saved_gate, saved_out)


@shaped
def backward(
    dy: Shaped[Array, "B Q O"], saved: Saved
) -> tuple[Shaped[Array, "B Q E"], Shaped[Array, "B K F"], Shaped[Array, "B K G"], Params]:
    z, g = saved.z, saved.g
    dgated, dout = linear.backward(dy, saved.out)
    dq, dk, dv, dattention = multi_head.backward(_for_features(g, z.shape[-1]) * dgated, saved.heads)
    dg = (z * dgated).reshape(*g.shape, z.shape[-1] // g.shape[-1]).sum(axis=-1)
    dq_gate, dgate = linear.backward(g * (1 - g) * dg, saved.gate)
    return dq + dq_gate, dk, dv, Params(dattention._replace(out=dout), dgate)


def _for_features(g, features):
    """(B, Q, M) with every number as often as its head has features."""
    return g.repeat(features // g.shape[-1], axis=-1)


def example(draw):
    call = multi_head.example(draw)
    *arrays, attention = call.args
    heads = call.options["heads"]
    passed = arrays[2].shape[-1] if attention.v is None else len(attention.v.weight)
    if attention.out is None:
        attention = attention._replace(out=draw.like(linear.init(draw.rng, passed, draw.size("O", high=3))))
    gates = draw.choice("gates", passed, heads)
    gate = draw.like(linear.init(draw.rng, arrays[0].shape[-1], gates, draw.choice("bias of the gate", False, True)))
    options = {name: value for name, value in call.options.items() if name != "add_zero_attn"}
    return Call((*arrays, Params(attention, gate)), options)


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
    witnesses=("definition", "relation"),
)
