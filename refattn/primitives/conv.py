r"""Convolution in any number of dimensions.

What the field calls a convolution: a cross-correlation, the kernel is not flipped.

Shapes
    N items, C channels in, O channels out, I = C / groups, *S space in, *K kernel, *T space out.
    T = floor((S + 2 padding - dilation (K - 1) - 1) / stride) + 1, axis by axis.

Forward, for one group, with p over positions of the output and k over positions of the kernel
    y_nop = b_o + sum_ik W_oik x_n,i,stride p + dilation k - padding          x is 0 outside its space

Backward, with a bar for "gradient of the loss with respect to"
    Wbar_oik = sum_np ybar_nop x_n,i,stride p + dilation k - padding
    bbar_o   = sum_np ybar_nop
    xbar_nis = sum over o, p, k with stride p + dilation k - padding = s of W_oik ybar_nop

Method
    The window of every output position is copied into a column (im2col); then all three sums are matrix products.
    The gradient of x is made in columns too, and added back where the columns came from (col2im).

Choices
    stride, padding and dilation are one number for all axes or one per axis; padding is zeros on both sides.
    W is (O, C / groups, *K) as in torch; Keras keeps (*K, C / groups, O).
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from refattn.blocks import by_channels
from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.windows import Windows, inside, pad, padded_space, taps, windows


class Params(NamedTuple):
    weight: Shaped[Array, "O I *K"]
    bias: Shaped[Array, "O"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N C *S"]
    params: Params
    windows: Windows
    groups: int


def init(rng, inputs, outputs, kernel, groups=1, bias=True):
    """Normal weights of variance 1 / fan_in, zero bias; `kernel` is a tuple, one length per axis."""
    shape = outputs, inputs // groups, *kernel
    return Params(rng.normal(size=shape) / math.sqrt(math.prod(shape[1:])), np.zeros(outputs) if bias else None)


@shaped
def forward(
    x: Shaped[Array, "N C *S"],
    params: Params,
    *,
    stride: int | tuple = 1,
    padding: int | tuple = 0,
    dilation: int | tuple = 1,
    groups: int = 1,
) -> tuple[Shaped[Array, "N O *T"], Saved]:
    _check(x, params.weight, groups)
    w = windows("conv.forward", x.shape[2:], params.weight.shape[2:], stride, padding, dilation)
    n, outputs = len(x), len(params.weight)
    dtype = np.result_type(x, *(p for p in params if p is not None))
    y = np.empty_like(x, dtype, "C", shape=(n, outputs, *w.output))
    grouped = _grouped(x, groups), _matrices(params.weight, groups), _grouped(y, groups)
    by_channels(functools.partial(_convolve, w), *grouped, expansion=math.prod(w.kernel))
    if params.bias is not None:
        y += params.bias.reshape(-1, *(1,) * len(w.output))
    return y, Saved(x, params, w, groups)


def _convolve(w, x, weight, y):
    """Fill y; groups are independent of one another, as channels are elsewhere."""
    np.matmul(weight, _columns(x, w), out=y.reshape(*y.shape[:3], math.prod(w.output)))


@shaped
def backward(dy: Shaped[Array, "N O *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params]:
    x, params, w, groups = saved
    dx = np.empty_like(x, np.result_type(dy, params.weight), "C")
    dweight = np.empty_like(params.weight, np.result_type(dy, x), "C")
    grouped = *(_grouped(a, groups) for a in (x, dy, dx)), *(_matrices(a, groups) for a in (params.weight, dweight))
    by_channels(functools.partial(_pull_back, w), *grouped, expansion=math.prod(w.kernel))
    dbias = None if params.bias is None else dy.sum(axis=(0, *range(2, dy.ndim)))
    return dx, Params(dweight, dbias)


def _pull_back(w, x, dy, dx, weight, dweight):
    """Fill dx and dweight."""
    dy = dy.reshape(*dy.shape[:3], math.prod(w.output))
    dweight[:] = (dy @ _columns(x, w).swapaxes(2, 3)).sum(axis=0)
    product = np.multiply if dy.shape[2] == 1 else np.matmul  # the same for one output, and faster
    if w.pointwise:
        product(weight.swapaxes(2, 3), dy, out=dx.reshape(*dx.shape[:3], dy.shape[3]))
    else:
        dx[:] = _add_columns(product(weight.swapaxes(2, 3), dy), x.shape, w)


def _grouped(x, groups):
    """(N, C, *S) as (N, groups, C / groups, *S)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def _matrices(weight, groups):
    """(O, I, *K) as one matrix per group, (1, groups, O / groups, I K)."""
    return weight.reshape(1, groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))


def _columns(x, w):
    """im2col: from (N, groups, I, *S) to (N, groups, I K, T)."""
    columns = x
    if not w.pointwise:
        padded = pad(x, w)
        columns = np.empty_like(x, shape=(*x.shape[:3], math.prod(w.kernel), *w.output))
        for k, tap in enumerate(taps(w)):
            columns[:, :, :, k] = padded[tap]
    return columns.reshape(*x.shape[:2], x.shape[2] * math.prod(w.kernel), math.prod(w.output))


def _add_columns(columns, shape, w):
    """col2im: from (N, groups, I K, T) to (N, groups, I, *S), every entry added to the pixel it was copied from."""
    columns = columns.reshape(*shape[:3], math.prod(w.kernel), *w.output)
    padded = np.zeros_like(columns, order="C", shape=(*shape[:3], *padded_space(w)))
    for k, tap in enumerate(taps(w)):
        padded[tap] += columns[:, :, :, k]
    return padded[inside(w)]


def _check(x, weight, groups):
    axes, (outputs, per_group, *kernel) = x.ndim - 2, weight.shape
    where = "conv.forward:"
    expect(len(kernel) == axes, f"{where} params.weight.shape", weight.shape, f"{axes} kernel axes, as x has")
    expect(isinstance(groups, int) and groups > 0, f"{where} groups", groups, "a positive int")
    expect(outputs % groups == 0, f"{where} groups", groups, f"a divisor of O = {outputs}, from params.weight")
    expect(
        per_group * groups == x.shape[1],
        *(f"{where} params.weight.shape", weight.shape, f"I = C / groups = {x.shape[1]} / {groups}, C from x"),
    )


def example(draw):
    axes, groups = draw.choice("axes", 1, 2, 3), draw.choice("groups", 1, 2)
    channels, outputs = groups * draw.size("C / groups", high=2), groups * draw.size("O / groups", high=2)
    kernel = tuple(draw.size(f"K{i}", high=3) for i in range(axes))
    dilation = tuple(draw.size(f"dilation {i}", high=2) for i in range(axes))
    space = tuple(d * (k - 1) + draw.size(f"S{i}", high=3) for i, (k, d) in enumerate(zip(kernel, dilation)))
    params = init(draw.rng, channels, outputs, kernel, groups, bias=draw.choice("bias", True, False))
    options = {
        "stride": draw.choice("stride", 1, 2),
        "padding": tuple(draw.size(f"padding {i}", low=0, high=2) for i in range(axes)),
        "dilation": dilation,
        "groups": groups,
    }
    return Call((draw.array(draw.size("N", high=2), channels, *space), draw.like(params)), options)


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
