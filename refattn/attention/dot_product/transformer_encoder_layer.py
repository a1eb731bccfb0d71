r"""Transformer encoder layer.

Every token looks at all tokens, then passes a small network of its own; what comes out is added to what went in.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.1.

Shapes
    B items, T tokens, D features, M hidden units.

Forward, with A for multi_head self-attention, F for feed_forward and N1, N2 for layer_norm
    x1 = N1(x + A(x)),    y = N2(x1 + F(x1))      norm after:  norm_first=False, the paper's
    x1 = x + A(N1(x)),    y = x1 + F(N2(x1))      norm before: norm_first=True

Backward, with a bar for "gradient of the loss with respect to", and N', F', A' for the backward of each part
    s = N2'(ybar),  x1bar = s + F'(s),    r = N1'(x1bar),  xbar = r + A'(r)       norm after
    x1bar = ybar + N2'(F'(ybar)),         xbar = x1bar + N1'(A'(x1bar))           norm before

Choices
    Norm before is due to Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020
    (arXiv:2002.04745). activation as in feed_forward. The paper has no biases in A, torch has; all are optional.
    key_mask[b, t] is True where token t takes part; torch's src_key_padding_mask is True where it does not. What is
    left out gets an output all the same. With is_causal no token sees a later one: this is the layer of a GPT.
    Dropout is given by its factors, 0 or 1 / (1 - p): on what A and F put out, as in the paper, and on the hidden
    units of F, as torch adds. torch drops attention weights as well; that is not offered here.
"""

from typing import NamedTuple

from refattn.attention.dot_product import multi_head
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import feed_forward, layer_norm


class Params(NamedTuple):
    attention: Shaped[multi_head.Params, "E=D F=D G=D O=D"]
    norm1: layer_norm.Params
    feed_forward: Shaped[feed_forward.Params, "D=D M=M O=D"]
    norm2: layer_norm.Params


class Dropout(NamedTuple):
    attention: Shaped[Array, "B T D"] | None = None
    hidden: Shaped[Array, "B T M"] | None = None
    feed_forward: Shaped[Array, "B T D"] | None = None


class Saved(NamedTuple):
    attention: multi_head.Saved
    norm1: layer_norm.Saved
    feed_forward: feed_forward.Saved
    norm2: layer_norm.Saved
    attn: Shaped[Array, "B H T T"]
    norm_first: bool
    dropout: Dropout


def init(rng, features, hidden, *, bias=True):
    """Each part as its own file starts it."""
    return Params(
        multi_head.init(rng, features, bias=bias),
        layer_norm.init(rng, features, bias=bias),
        feed_forward.init(rng, features, hidden, bias=bias),
        layer_norm.init(rng, features, bias=bias),
    )


@shaped
def forward(
    x: Shaped[Array, "B T D"],
    params: Params,
    *,
    heads: int,
    norm_first: bool = False,
    activation: str = "relu",
    key_mask: Shaped[Bools, "B T"] | None = None,
    is_causal: bool = False,
    dropout: Dropout | None = None,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "B T D"], Saved]:
    what = "transformer_encoder_layer.forward: activation"
    expect(activation in feed_forward.ACTIVATIONS, what, activation, f"one of {', '.join(feed_forward.ACTIVATIONS)}")
    dropout = dropout or Dropout()

    def attend(x):
        y, saved = multi_head.forward(x, x, x, params.attention, heads=heads, key_mask=key_mask, is_causal=is_causal)
        return _drop(y, dropout.attention), saved

    def feed(x):
        y, saved = feed_forward.forward(x, params.feed_forward, activation=activation, dropout=dropout.hidden)
        return _drop(y, dropout.feed_forward), saved

    x1, attention, norm1 = residual(x, attend, params.norm1, norm_first, eps)
    y, fed, norm2 = residual(x1, feed, params.norm2, norm_first, eps)
    return y, Saved(attention, norm1, fed, norm2, attention.attn, norm_first, dropout)


@shaped
def backward(dy: Shaped[Array, "B T D"], saved: Saved) -> tuple[Shaped[Array, "B T D"], Params]:
    def attend(dy):
        dq, dk, dv, dparams = multi_head.backward(_drop(dy, saved.dropout.attention), saved.attention)
        return dq + dk + dv, dparams

    def feed(dy):
        return feed_forward.backward(_drop(dy, saved.dropout.feed_forward), saved.feed_forward)

    dx1, dfeed, dnorm2 = residual_backward(dy, feed, saved.norm2, saved.norm_first)
    dx, dattention, dnorm1 = residual_backward(dx1, attend, saved.norm1, saved.norm_first)
    return dx, Params(dattention, dnorm1, dfeed, dnorm2)


def residual(x, part, norm_params, norm_first, eps):
    """One step, N(x + part(x)) or x + part(N(x)): its output, what the part saved, and what the norm saved."""
    if norm_first:
        normed, saved_norm = layer_norm.forward(x, norm_params, eps=eps)
        s, saved = part(normed)
        return x + s, saved, saved_norm
    s, saved = part(x)
    y, saved_norm = layer_norm.forward(x + s, norm_params, eps=eps)
    return y, saved, saved_norm


def residual_backward(dy, part, saved_norm, norm_first):
    """The gradients of x, of the part's parameters, and of the norm's; part(ds) returns its own two."""
    if norm_first:
        dnormed, dparams = part(dy)
        dx, dnorm = layer_norm.backward(dnormed, saved_norm)
        return dy + dx, dparams, dnorm
    ds, dnorm = layer_norm.backward(dy, saved_norm)
    dx, dparams = part(ds)
    return ds + dx, dparams, dnorm


def _drop(x, factors):
    return x if factors is None else x * factors


def example(draw):
    """eps is large, as in the example of layer_norm."""
    heads = draw.choice("heads", 1, 2)
    b, t, hidden = draw.size("B", high=2), draw.size("T", high=3), draw.size("M", high=3)
    features = heads * draw.size("D / heads", high=3)
    params = draw.like(init(draw.rng, features, hidden, bias=draw.choice("bias", True, False)))
    dropout = Dropout(*(2.0 * draw.mask(b, t, size) for size in (features, hidden, features)))
    options = {
        "heads": heads,
        "norm_first": draw.choice("norm_first", False, True),
        "activation": draw.choice("activation", *feed_forward.ACTIVATIONS),
        "key_mask": draw.mask(b, t) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "dropout": draw.choice("dropout", None, dropout),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    return Call((draw.array(b, t, features), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "causal"),
    witnesses=("framework", "definition", "relation"),
)
