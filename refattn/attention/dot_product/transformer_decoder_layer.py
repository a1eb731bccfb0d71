r"""Transformer decoder layer.

An encoder layer with one step more: between the two, every token looks at what an encoder made of another sequence.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.1.

Shapes
    B items, T tokens of D features, S tokens of the memory (the encoder's output) of E features, M hidden units.

Forward, with A for multi_head self-attention, C for multi_head attention to the memory m, F for feed_forward
    x1 = N1(x + A(x)),    x2 = N2(x1 + C(x1, m)),     y = N3(x2 + F(x2))      norm after:  norm_first=False
    x1 = x + A(N1(x)),    x2 = x1 + C(N2(x1), m),     y = x2 + F(N3(x2))      norm before: norm_first=True

Backward, with a bar for "gradient of the loss with respect to"
    x2bar, x1bar, xbar = the three steps backwards, each as in transformer_encoder_layer
    mbar = what C passes to its keys, plus what it passes to its values

Choices
    is_causal=True, as in the paper: no token sees a later one; torch has to be told so. key_mask (the tokens) and
    memory_mask (the memory) are True where a key takes part; torch's padding masks are True where it does not.
    norm_first and activation are as in transformer_encoder_layer. Saved.attn maps tokens to the memory.
"""

from typing import NamedTuple

from refattn.attention.dot_product import multi_head
from refattn.attention.dot_product.transformer_encoder_layer import residual, residual_backward
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import feed_forward, layer_norm


class Params(NamedTuple):
    attention: Shaped[multi_head.Params, "E=D F=D G=D O=D"]
    norm1: layer_norm.Params
    cross_attention: Shaped[multi_head.Params, "E=D F=E G=E O=D"]
    norm2: layer_norm.Params
    feed_forward: Shaped[feed_forward.Params, "D=D O=D"]
    norm3: layer_norm.Params


class Saved(NamedTuple):
    attention: multi_head.Saved
    norm1: layer_norm.Saved
    cross_attention: multi_head.Saved
    norm2: layer_norm.Saved
    feed_forward: feed_forward.Saved
    norm3: layer_norm.Saved
    attn: Shaped[Array, "B H T S"]
    norm_first: bool


def init(rng, features, hidden, *, memory_features=None, bias=True):
    """Each part as its own file starts it."""
    memory = memory_features or features
    return Params(
        multi_head.init(rng, features, bias=bias),
        layer_norm.init(rng, features, bias=bias),
        multi_head.init(rng, features, key_features=memory, value_features=memory, bias=bias),
        layer_norm.init(rng, features, bias=bias),
        feed_forward.init(rng, features, hidden, bias=bias),
        layer_norm.init(rng, features, bias=bias),
    )


@shaped
def forward(
    x: Shaped[Array, "B T D"],
    memory: Shaped[Array, "B S E"],
    params: Params,
    *,
    heads: int,
    norm_first: bool = False,
    activation: str = "relu",
    key_mask: Shaped[Bools, "B T"] | None = None,
    memory_mask: Shaped[Bools, "B S"] | None = None,
    is_causal: bool = True,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "B T D"], Saved]:
    what = "transformer_decoder_layer.forward: activation"
    expect(activation in feed_forward.ACTIVATIONS, what, activation, f"one of {', '.join(feed_forward.ACTIVATIONS)}")

    def attend(x):
        return multi_head.forward(x, x, x, params.attention, heads=heads, key_mask=key_mask, is_causal=is_causal)

    def cross(x):
        return multi_head.forward(x, memory, memory, params.cross_attention, heads=heads, key_mask=memory_mask)

    def feed(x):
        return feed_forward.forward(x, params.feed_forward, activation=activation)

    x1, attention, norm1 = residual(x, attend, params.norm1, norm_first, eps)
    x2, crossed, norm2 = residual(x1, cross, params.norm2, norm_first, eps)
    y, fed, norm3 = residual(x2, feed, params.norm3, norm_first, eps)
    return y, Saved(attention, norm1, crossed, norm2, fed, norm3, crossed.attn, norm_first)


@shaped
def backward(
    dy: Shaped[Array, "B T D"], saved: Saved
) -> tuple[Shaped[Array, "B T D"], Shaped[Array, "B S E"], Params]:
    def attend(dy):
        dq, dk, dv, dparams = multi_head.backward(dy, saved.attention)
        return dq + dk + dv, dparams

    def cross(dy):
        dq, dk, dv, dparams = multi_head.backward(dy, saved.cross_attention)
        return dq, (dk + dv, dparams)

    def feed(dy):
        return feed_forward.backward(dy, saved.feed_forward)

    dx2, dfeed, dnorm3 = residual_backward(dy, feed, saved.norm3, saved.norm_first)
    dx1, (dmemory, dcross), dnorm2 = residual_backward(dx2, cross, saved.norm2, saved.norm_first)
    dx, dattention, dnorm1 = residual_backward(dx1, attend, saved.norm1, saved.norm_first)
    return dx, dmemory, Params(dattention, dnorm1, dcross, dnorm2, dfeed, dnorm3)


def example(draw):
    """eps is large, as in the example of layer_norm."""
    heads = draw.choice("heads", 1, 2)
    b, t, s, hidden = draw.size("B", high=2), draw.size("T", high=3), draw.size("S", high=3), draw.size("M", high=3)
    features, memory_features = heads * draw.size("D / heads", high=2), draw.size("E", high=3)
    bias = draw.choice("bias", True, False)
    params = draw.like(init(draw.rng, features, hidden, memory_features=memory_features, bias=bias))
    options = {
        "heads": heads,
        "norm_first": draw.choice("norm_first", False, True),
        "activation": draw.choice("activation", *feed_forward.ACTIVATIONS),
        "key_mask": draw.mask(b, t) if draw.choice("padded", False, True) else None,
        "memory_mask": draw.mask(b, s) if draw.choice("memory padded", False, True) else None,
        "is_causal": draw.choice("is_causal", True, False),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    return Call((draw.array(b, t, features), draw.array(b, s, memory_features), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("framework", "definition", "relation"),
)
