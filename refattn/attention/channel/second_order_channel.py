r"""Second-order channel attention (SOCA).

Scale every channel by a gate computed from how all channels vary together, where squeeze-and-excitation takes means.

Paper: Dai, Cai, Zhang, Xia and Zhang, "Second-Order Attention Network for Single Image Super-Resolution", CVPR 2019,
section 3.

Shapes
    N images, C channels, H by W pixels, R = C / reduction hidden units.

Forward
    s_n    = covariance of the channels over pixels          (C, C)
    r_n    = square root of s_n, K Newton-Schulz iterations
    v_nc   = mean_i r_nic
    a_nr   = W1 v + b1,   h = max(a, 0)
    g_nc   = sigmoid(W2 h + b2)
    y_ncij = g_nc x_ncij

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nc   = sum_ij ybar_ncij x_ncij
    ubar      = gbar g (1 - g)                u = W2 h + b2
    hbar      = ubar W2,   abar = hbar [a > 0]
    vbar      = abar W1
    rbar_nic  = vbar_nc / C                   for all i: not symmetric
    sbar      = matrix_sqrt's gradient of rbar
    xbar_ncij = ybar_ncij g_nc + covariance_pool's gradient of sbar

Choices
    K = 5 is far from convergence where s is ill-conditioned; the gradient is that of the K steps. See matrix_sqrt.
    s with fewer pixels than channels is singular, and fine. That of a constant image is 0, which has no such root:
    an error here, NaN in the authors' code.
    crop: the authors take the covariance of the middle 1000 by 1000 pixels only. Where one side is exactly `crop` and
    the other is shorter, their slice of the shorter side starts at a negative index, which counts from the end: of
    700 by 1000 pixels they see the last 150 rows. So does this file. crop=None takes all pixels.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import relu, sigmoid
from refattn.primitives import covariance_pool, matrix_sqrt


class Params(NamedTuple):
    w1: Shaped[Array, "R C"]
    w2: Shaped[Array, "C R"]
    b1: Shaped[Array, "R"] | None = None
    b2: Shaped[Array, "C"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    seen: tuple  # the slices of rows and columns
    covariance: covariance_pool.Saved
    root: matrix_sqrt.Saved
    v: Shaped[Array, "N C"]
    h: Shaped[Array, "N R"]
    gate: Shaped[Array, "N C"]
    params: Params


def init(rng, channels, reduction=16, bias=True):
    """Normal weights of variance 1 / fan_in, zero biases."""
    hidden = max(channels // reduction, 1)
    return Params(
        w1=rng.normal(size=(hidden, channels)) / math.sqrt(channels),
        w2=rng.normal(size=(channels, hidden)) / math.sqrt(hidden),
        b1=np.zeros(hidden) if bias else None,
        b2=np.zeros(channels) if bias else None,
    )


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Params, *, iterations: int = 5, crop: int | None = 1000
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    w1, w2, b1, b2 = params
    expect(crop is None or crop > 0, "second_order_channel.forward: crop", crop, "a positive int, or None")
    rows, columns = _middle(*x.shape[2:], crop)
    s, covariance = covariance_pool.forward(x[:, :, rows, columns])
    varies = s.real.diagonal(axis1=1, axis2=2).sum(axis=1)
    expect((varies > 0).all(), "second_order_channel.forward: variance of x", varies, "images that are not constant")
    r, root = matrix_sqrt.forward(s, iterations=iterations)
    v = r.mean(axis=1)
    h = relu(v @ w1.T + (0 if b1 is None else b1))
    gate = sigmoid(h @ w2.T + (0 if b2 is None else b2))
    return x * gate[:, :, None, None], Saved(x, (rows, columns), covariance, root, v, h, gate, params)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, (rows, columns), covariance, root, v, h, gate, (w1, w2, b1, b2) = saved
    dgate = np.einsum("nchw,nchw->nc", dy, x)
    du = dgate * gate * (1 - gate)
    da = (du @ w2) * (h.real > 0)
    dv = da @ w1
    dr = np.repeat(dv[:, None, :] / dv.shape[1], dv.shape[1], axis=1)
    (ds,) = matrix_sqrt.backward(dr, root)
    dx = dy * gate[:, :, None, None]
    dx[:, :, rows, columns] += covariance_pool.backward(ds, covariance)[0]
    db1 = None if b1 is None else da.sum(axis=0)
    db2 = None if b2 is None else du.sum(axis=0)
    return dx, Params(da.T @ v, du.T @ h, db1, db2)


def _middle(height, width, crop):
    """The slices of rows and columns that the authors' code takes: all, unless a side reaches `crop`."""
    if crop is None or (height < crop and width < crop):
        return slice(None), slice(None)
    top, left = (height - crop) // 2, (width - crop) // 2  # negative where the side is shorter than `crop`
    rows = slice(None) if height < crop < width else slice(top, top + crop)
    columns = slice(None) if width < crop < height else slice(left, left + crop)
    return rows, columns


CASES = (  # height, width, crop: one for every way that `_middle` can go
    *((1, 2, None), (3, 2, 1000)),  # all
    *((2, 4, 3), (4, 1, 2), (3, 4, 2)),  # columns, rows, both
    *((2, 4, 4), (3, 2, 3)),  # the shorter side from its end
)


def example(draw):
    channels, (height, width, crop) = draw.size("C", high=3), draw.choice("height, width, crop", *CASES)
    ramp = np.arange(height * width).reshape(height, width) / 24  # no image may be constant
    x = draw.array(draw.size("N", high=3), channels, height, width) + ramp
    params = draw.like(init(draw.rng, channels, draw.choice("reduction", 1, 2), bias=draw.choice("bias", True, False)))
    params = tree_map(lambda p: p / 4 + 33 / 128, params)  # never 0, where the ReLU has its kink
    return Call((x, params), {"crop": crop, "iterations": draw.choice("iterations", 5, 2)})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval"),
    witnesses=("authors' code", "definition", "relation"),
)
