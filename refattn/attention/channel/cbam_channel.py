r"""The channel gate of CBAM.

Scale every channel by a gate computed from several global pools of all channels, each through the same MLP.

Paper: Woo, Park, Lee and Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018 (arXiv:1807.06521),
section 3, equation 2.

Shapes
    N images, C channels, H by W pixels, R = C / reduction hidden units; k counts the pools.

Forward
    z_knc  = pool_k(x_nc)                     over the pixels; each of
        avg    1/(HW) sum_ij x_ncij
        max    max_ij x_ncij
        lp     sqrt(sum_ij x_ncij^2)
        lse    log sum_ij exp(x_ncij)
    h_knr  = max(W1 z_k + b1, 0)              the same W1, b1, W2, b2 for every pool
    e_nc   = sum_k (W2 h_k + b2)
    g_nc   = sigmoid(e)
    y_ncij = g_nc x_ncij

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nc   = sum_ij ybar_ncij x_ncij
    ebar      = gbar g (1 - g)                every pool gets the same ebar
    abar_k    = (ebar W2) [h_k > 0]           a_k = W1 z_k + b1
    zbar_k    = abar_k W1
    xbar_ncij = ybar_ncij g_nc, and from each pool k
        avg    zbar_knc / (HW)
        max    zbar_knc [ij is the first maximum]
        lp     zbar_knc x_ncij / z_knc        0 where z is 0
        lse    zbar_knc exp(x_ncij - z_knc)   a softmax over the pixels

Choices
    pools are any of the four, in any order. The paper and the authors' default take avg and max; lp and lse are options
    of their code. b2 enters once for every pool.
    The paper's MLP has no biases, the authors' code has: b1 and b2 are optional.
    With fewer channels than `reduction` the authors have no hidden unit and a constant gate; `init` keeps one.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.elementwise import relu, sigmoid

POOLS = ("avg", "max", "lp", "lse")


class Params(NamedTuple):
    w1: Shaped[Array, "R C"]
    w2: Shaped[Array, "C R"]
    b1: Shaped[Array, "R"] | None = None
    b2: Shaped[Array, "C"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    z: Shaped[Array, "P N C"]
    h: Shaped[Array, "P N R"]
    gate: Shaped[Array, "N C"]
    params: Params
    pools: tuple


def init(rng, channels, reduction=16, bias=True):
    """Normal weights with variance 1 / fan_in, zero biases."""
    hidden = max(channels // reduction, 1)
    return Params(
        w1=rng.normal(size=(hidden, channels)) / math.sqrt(channels),
        w2=rng.normal(size=(channels, hidden)) / math.sqrt(hidden),
        b1=np.zeros(hidden) if bias else None,
        b2=np.zeros(channels) if bias else None,
    )


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Params, *, pools: tuple = ("avg", "max")
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    good = isinstance(pools, tuple) and pools and set(pools) <= set(POOLS)
    expect(good, "cbam_channel.forward: pools", pools, f"a tuple of one or more of {POOLS}")
    w1, w2, b1, b2 = params
    z = np.stack([_pool(kind, _flat(x)) for kind in pools])
    h = relu(z @ w1.T if b1 is None else z @ w1.T + b1)
    e = (h @ w2.T if b2 is None else h @ w2.T + b2).sum(axis=0)
    gate = sigmoid(e)
    return x * gate[:, :, None, None], Saved(x, z, h, gate, params, pools)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, z, h, gate, params, pools = saved
    w1, w2, b1, b2 = params
    dgate = np.einsum("nchw,nchw->nc", dy, x)
    de = dgate * gate * (1 - gate)
    da = (de @ w2) * (h.real > 0)
    dz = da @ w1
    dx = _flat(dy) * gate[:, :, None]
    for kind, dz_k, z_k in zip(pools, dz, z):
        dx += _pool_backward(kind, dz_k, z_k, _flat(x))
    return dx.reshape(x.shape), Params(
        w1=np.einsum("knr,knc->rc", da, z),
        w2=de.T @ h.sum(axis=0),
        b1=None if b1 is None else da.sum(axis=(0, 1)),
        b2=None if b2 is None else len(pools) * de.sum(axis=0),
    )


def _flat(x):
    """(N, C, H, W) as (N, C, HW)."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _pool(kind, x):
    """(N, C, HW) to (N, C)."""
    if kind == "avg":
        return x.mean(axis=2)
    if kind == "lp":
        return np.sqrt((x * x).sum(axis=2))
    top = np.take_along_axis(x, _winner(x), axis=2)
    if kind == "lse":  # shifted by the maximum, so that nothing overflows
        top = top + np.log(np.exp(x - top).sum(axis=2, keepdims=True))
    return top[:, :, 0]


def _pool_backward(kind, dz, z, x):
    """(N, C) to (N, C, HW), or to what broadcasts to it."""
    dz, z = dz[:, :, None], z[:, :, None]
    if kind == "avg":
        return dz / x.shape[2]
    if kind == "lp":
        return np.where(z.real == 0, 0, dz / np.where(z.real == 0, 1, z)) * x
    if kind == "lse":
        return dz * np.exp(x - z)
    dx = np.zeros_like(x, dz.dtype, "C")
    np.put_along_axis(dx, _winner(x), dz, axis=2)
    return dx


def _winner(x):
    """Where the maximum of every channel is, the first of equal ones: (N, C, 1)."""
    return x.real.argmax(axis=2)[:, :, None]


def example(draw):
    reduction, channels = draw.choice("reduction", 1, 2), draw.size("C")
    pools = draw.choice("pools", ("avg", "max"), ("max",), ("lp",), ("lse", "avg"), ("lse", "max", "lp", "avg"))
    x = draw.array(draw.size("N", high=3), channels, draw.size("H", high=3), draw.size("W"))
    params = draw.like(init(draw.rng, channels, reduction, bias=draw.choice("bias", True, False)))
    return Call((x, params), {"pools": pools})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval", "pixel_permutation_equivariant"),
    witnesses=("framework", "definition", "relation"),
)
