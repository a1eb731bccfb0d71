r"""Linear map of the last axis.

Shapes
    ... any leading axes, I features in, O features out.

Forward
    y_o = sum_i W_oi x_i + b_o

Backward, with a bar for "gradient of the loss with respect to"
    xbar_i  = sum_o ybar_o W_oi
    Wbar_oi = sum over the leading axes of ybar_o x_i
    bbar_o  = sum over the leading axes of ybar_o

Choices
    W is (out, in), as in torch; Keras and TensorFlow keep (in, out). Without a bias, bias=None.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, shaped


class Params(NamedTuple):
    weight: Shaped[Array, "O I"]
    bias: Shaped[Array, "O"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "*L I"]
    params: Params


def init(rng, inputs, outputs, bias=True):
    """Normal weights of variance 1 / inputs, zero bias."""
    return Params(rng.normal(size=(outputs, inputs)) / math.sqrt(inputs), np.zeros(outputs) if bias else None)


@shaped
def forward(x: Shaped[Array, "*L I"], params: Params) -> tuple[Shaped[Array, "*L O"], Saved]:
    y = x @ params.weight.T
    if params.bias is not None:
        y = y + params.bias
    return y, Saved(x, params)


@shaped
def backward(dy: Shaped[Array, "*L O"], saved: Saved) -> tuple[Shaped[Array, "*L I"], Params]:
    x, params = saved
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dbias = None if params.bias is None else flat_dy.sum(axis=0)
    return dy @ params.weight, Params(flat_dy.T @ flat_x, dbias)


def example(draw):
    lead = draw.choice("leading axes", (draw.size("L"),), (draw.size("L1"), draw.size("L2")))
    inputs, outputs = draw.size("I"), draw.size("O")
    params = draw.like(init(draw.rng, inputs, outputs, bias=draw.choice("bias", True, False)))
    return Call((draw.array(*lead, inputs), params), {})


ABOUT = About(witnesses=("framework", "definition"))
