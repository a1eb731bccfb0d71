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

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Params(NamedTuple):
    weight: Shaped[Array, "O I *K"]
    bias: Shaped[Array, "O"] | None = None


class Geometry(NamedTuple):
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int


class Saved(NamedTuple):
    x: Shaped[Array, "N C *S"]
    params: Params
    geometry: Geometry


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
    geometry = _geometry(x, params, stride, padding, dilation, groups)
    weight, columns = _rows(params.weight, groups), _columns(x, params.weight, geometry)
    y = (weight @ columns).reshape(x.shape[0], params.weight.shape[0], *_output_space(x, params.weight, geometry))
    if params.bias is not None:
        y = y + params.bias.reshape(-1, *(1,) * (x.ndim - 2))
    return y, Saved(x, params, geometry)


@shaped
def backward(dy: Shaped[Array, "N O *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params]:
    x, params, geometry = saved
    weight, groups = params.weight, geometry.groups
    dy_flat = dy.reshape(dy.shape[0], groups, weight.shape[0] // groups, math.prod(dy.shape[2:]))
    columns = _columns(x, weight, geometry)
    dweight = (dy_flat @ columns.swapaxes(2, 3)).sum(axis=0).reshape(weight.shape)
    dx = _add_columns(_rows(weight, groups).swapaxes(1, 2) @ dy_flat, x, weight, geometry)
    dbias = None if params.bias is None else dy.sum(axis=(0, *range(2, dy.ndim)))
    return dx, Params(dweight, dbias)


def _rows(weight, groups):
    """(O, I, *K) as one matrix per group, (groups, O / groups, I K)."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _columns(x, weight, geometry):
    """im2col: (N, groups, I K, T)."""
    (n, c), space, kernel = x.shape[:2], _output_space(x, weight, geometry), weight.shape[2:]
    windows = _windows(_pad(x, geometry), kernel, space, geometry)
    return windows.reshape(n, geometry.groups, c // geometry.groups * math.prod(kernel), math.prod(space))


def _add_columns(columns, x, weight, geometry):
    """col2im: every entry of the columns, added to the pixel it was copied from."""
    kernel, space = weight.shape[2:], _output_space(x, weight, geometry)
    padded = np.zeros((*x.shape[:2], *(s + 2 * p for s, p in zip(x.shape[2:], geometry.padding))), columns.dtype)
    columns = columns.reshape(*x.shape[:2], *kernel, *space)
    for k in np.ndindex(*kernel):
        where = tuple(
            slice(d * i, d * i + s * (t - 1) + 1, s) for i, d, s, t in zip(k, geometry.dilation, geometry.stride, space)
        )
        padded[(..., *where)] += columns[(slice(None), slice(None), *k)]
    inside = tuple(slice(p, p + s) for s, p in zip(x.shape[2:], geometry.padding))
    return padded[(..., *inside)]


def _windows(x, kernel, space, geometry):
    """A view of x, (N, C, *K, *T): the pixel that kernel position k sees from output position t."""
    steps = x.strides[2:]
    strides = (
        *x.strides[:2],
        *(d * step for d, step in zip(geometry.dilation, steps)),
        *(s * step for s, step in zip(geometry.stride, steps)),
    )
    return np.lib.stride_tricks.as_strided(x, (*x.shape[:2], *kernel, *space), strides, writeable=False)


def _pad(x, geometry):
    return np.pad(x, ((0, 0), (0, 0), *((p, p) for p in geometry.padding))) if any(geometry.padding) else x


def _output_space(x, weight, geometry):
    return tuple(
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(x.shape[2:], weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    )


def _geometry(x, params, stride, padding, dilation, groups):
    axes, (outputs, per_group, *kernel) = x.ndim - 2, params.weight.shape
    where = "conv.forward:"
    expect(len(kernel) == axes, f"{where} params.weight.shape", params.weight.shape, f"{axes} kernel axes, as x has")
    expect(isinstance(groups, int) and groups > 0, f"{where} groups", groups, "a positive int")
    expect(outputs % groups == 0, f"{where} groups", groups, f"a divisor of O = {outputs}, from params.weight")
    expect(
        per_group * groups == x.shape[1],
        *(f"{where} params.weight.shape", params.weight.shape),
        f"I = C / groups = {x.shape[1]} / {groups}, C from x",
    )
    geometry = Geometry(
        _per_axis(f"{where} stride", stride, axes, 1),
        _per_axis(f"{where} padding", padding, axes, 0),
        _per_axis(f"{where} dilation", dilation, axes, 1),
        groups,
    )
    space = _output_space(x, params.weight, geometry)
    expect(all(t > 0 for t in space), f"{where} x.shape", x.shape, f"space that the kernel {(*kernel,)} fits into")
    return geometry


def _per_axis(what, value, axes, least):
    values = value if isinstance(value, tuple) else (value,) * axes
    fits = len(values) == axes and all(isinstance(v, (int, np.integer)) and v >= least for v in values)
    expect(fits, what, value, f"an int of at least {least}, or {axes} of them")
    return values


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
