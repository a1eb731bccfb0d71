r"""Convolution, batch normalisation and ReLU as one block.

Shapes
    N items, C channels in, O channels out, *S space in, *T space out.

Forward
    a = conv(x)
    u = batch_norm(a)
    y = max(u, 0)

Backward, with a bar for "gradient of the loss with respect to"
    ubar = ybar [y > 0]
    abar = batch normalisation's gradient of ubar
    xbar = the convolution's gradient of abar

Choices
    stats=None is training, given stats are inference: see batch_norm. A bias of the convolution is taken out again by
    a training batch norm, so that its gradient is then 0. relu'(0) = 0.
"""

from typing import NamedTuple

from refattn.core import About, Array, Call, Shaped, shaped
from refattn.elementwise import relu
from refattn.primitives import batch_norm, conv


class Params(NamedTuple):
    conv: conv.Params
    norm: batch_norm.Params


class Saved(NamedTuple):
    conv: conv.Saved
    norm: batch_norm.Saved
    y: Shaped[Array, "N O *T"]


def init(rng, inputs, outputs, kernel, groups=1, bias=False):
    """Each part as its own file starts it; `kernel` is a tuple, one length per axis."""
    return Params(conv.init(rng, inputs, outputs, kernel, groups, bias), batch_norm.init(rng, outputs))


@shaped
def forward(
    x: Shaped[Array, "N C *S"],
    params: Params,
    *,
    stats: batch_norm.Stats | None = None,
    stride: int | tuple = 1,
    padding: int | tuple = 0,
    dilation: int | tuple = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> tuple[Shaped[Array, "N O *T"], Saved]:
    a, convolved = conv.forward(x, params.conv, stride=stride, padding=padding, dilation=dilation, groups=groups)
    u, normed = batch_norm.forward(a, params.norm, stats=stats, eps=eps)
    y = relu(u)
    return y, Saved(convolved, normed, y)


@shaped
def backward(dy: Shaped[Array, "N O *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params]:
    du = dy * (saved.y.real > 0)
    da, dnorm = batch_norm.backward(du, saved.norm)
    dx, dconv = conv.backward(da, saved.conv)
    return dx, Params(dconv, dnorm)


def example(draw):
    groups, dilation, kernel = draw.choice("groups", 1, 2), draw.size("dilation", high=2), draw.size("K", high=3)
    channels, outputs = groups * draw.size("C / groups", high=2), groups * draw.size("O / groups", high=2)
    space = tuple(dilation * (kernel - 1) + draw.size(f"S{i}", high=3) for i in range(draw.size("axes", high=2)))
    x = draw.array(draw.size("N", low=2, high=3), channels, *space)
    bias = draw.choice("bias", True, False)
    params = draw.like(init(draw.rng, channels, outputs, (kernel,) * len(space), groups, bias))
    stats = None
    if draw.choice("mode", "training", "inference", "inference again") != "training":
        stats = batch_norm.example_stats(draw, outputs)
    options = {"stride": draw.choice("stride", 1, 2), "padding": draw.choice("padding", 0, 1)}
    options["eps"] = draw.choice("eps", 1e-5, 1e-3)
    return Call((x, params), {"stats": stats, "dilation": dilation, "groups": groups, **options})


ABOUT = About(witnesses=("relation",))
