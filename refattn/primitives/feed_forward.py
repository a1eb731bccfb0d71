r"""Position-wise feed-forward network.

Two linear maps of the last axis with an activation between them: the other half of a transformer layer.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.3.

Shapes
    ... any leading axes, D features in, M hidden units, O features out.

Forward
    a = W1 x + b1
    h = activation(a) dropout
    y = W2 h + b2

Backward, with a bar for "gradient of the loss with respect to"
    hbar = W2^T ybar                          W2bar, b2bar: see linear
    abar = hbar dropout activation'(a)
    xbar = W1^T abar                          W1bar, b1bar: see linear

Choices
    activation is "relu" (the paper's), "gelu" (by erf: torch, BERT) or "gelu_tanh" (GPT-2). relu'(0) = 0.
    dropout holds its factors, 0 or 1 / (1 - p); None is none, as in the paper. Biases are optional.
"""

from typing import NamedTuple

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.elementwise import gelu, gelu_slope, gelu_tanh, gelu_tanh_slope, relu
from refattn.primitives import linear

ACTIVATIONS = {  # name: (function, slope)
    "relu": (relu, lambda a: a.real > 0),
    "gelu": (gelu, gelu_slope),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
}


class Params(NamedTuple):
    linear1: Shaped[linear.Params, "I=D O=M"]
    linear2: Shaped[linear.Params, "I=M O=O"]


class Saved(NamedTuple):
    linear1: linear.Saved
    a: Shaped[Array, "*L M"]
    linear2: linear.Saved
    activation: str
    dropout: Shaped[Array, "*L M"] | None


def init(rng, features, hidden, *, bias=True):
    """Both maps as linear.init starts them; as many features out as in."""
    return Params(linear.init(rng, features, hidden, bias), linear.init(rng, hidden, features, bias))


@shaped
def forward(
    x: Shaped[Array, "*L D"],
    params: Params,
    *,
    activation: str = "relu",
    dropout: Shaped[Array, "*L M"] | None = None,
) -> tuple[Shaped[Array, "*L O"], Saved]:
    what = "feed_forward.forward: activation"
    expect(activation in ACTIVATIONS, what, activation, f"one of {', '.join(ACTIVATIONS)}")
    function, _ = ACTIVATIONS[activation]
    a, saved1 = linear.forward(x, params.linear1)
    h = function(a) if dropout is None else function(a) * dropout
    y, saved2 = linear.forward(h, params.linear2)
    return y, Saved(saved1, a, saved2, activation, dropout)


@shaped
def backward(dy: Shaped[Array, "*L O"], saved: Saved) -> tuple[Shaped[Array, "*L D"], Params]:
    _, slope = ACTIVATIONS[saved.activation]
    dh, dlinear2 = linear.backward(dy, saved.linear2)
    da = dh * slope(saved.a) if saved.dropout is None else dh * saved.dropout * slope(saved.a)
    dx, dlinear1 = linear.backward(da, saved.linear1)
    return dx, Params(dlinear1, dlinear2)


def example(draw):
    lead = draw.choice("leading axes", (draw.size("L"),), (draw.size("L1", high=2), draw.size("L2", high=3)))
    features, hidden, bias = draw.size("D"), draw.size("M"), draw.choice("bias", True, False)
    options = {
        "activation": draw.choice("activation", *ACTIVATIONS),
        "dropout": 2.0 * draw.mask(*lead, hidden) if draw.choice("dropout", False, True) else None,
    }
    return Call((draw.array(*lead, features), draw.like(init(draw.rng, features, hidden, bias=bias))), options)


ABOUT = About(witnesses=("framework", "definition", "relation"))
