r"""The spatial gate of CBAM.

Scale every pixel by a gate computed from the maximum and the mean over channels of the pixels around it.

Paper: Woo, Park, Lee and Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018 (arXiv:1807.06521),
section 3, equation 3.

Shapes
    N images, C channels, H by W pixels, K by L kernel, both odd.

Forward
    q_n0ij = max_c x_ncij
    q_n1ij = 1/C sum_c x_ncij
    f_nij  = conv(q), as large as x; batch_norm of it
    g_nij  = sigmoid(f)
    y_ncij = g_nij x_ncij

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nij  = sum_c ybar_ncij x_ncij
    fbar      = gbar g (1 - g)
    qbar      = the convolution's gradient of batch normalisation's gradient of fbar
    xbar_ncij = ybar_ncij g_nij + qbar_n1ij / C + qbar_n0ij [c is the first maximum]

Choices
    The authors' code puts the maximum before the mean, the paper after it: maps=("avg", "max").
    The authors' code normalises f, with one gamma and one beta, the paper does not: params.norm=None.
    stats=None is training, given stats are inference.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped
from refattn.elementwise import sigmoid
from refattn.primitives import batch_norm, conv


class Params(NamedTuple):
    weight: Shaped[Array, "1 2 K L"]
    norm: batch_norm.Params | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    gate: Shaped[Array, "N 1 H W"]
    winner: Shaped[Ints, "N 1 H W"]  # the channel of the maximum, the first of equal ones
    conv: conv.Saved
    norm: batch_norm.Saved | None
    maps: tuple


def init(rng, kernel=7, norm=True):
    """Normal weights with variance 1 / fan_in; gamma = 0, so that every gate starts at 1/2, as the authors train it."""
    weight = rng.normal(size=(1, 2, kernel, kernel)) / math.sqrt(2 * kernel * kernel)
    return Params(weight, batch_norm.Params(np.zeros(1), np.zeros(1)) if norm else None)


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    maps: tuple = ("max", "avg"),
    stats: batch_norm.Stats | None = None,
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    where, kernel = "cbam_spatial.forward:", params.weight.shape[2:]
    expect(maps in (("max", "avg"), ("avg", "max")), f"{where} maps", maps, "('max', 'avg') or ('avg', 'max')")
    expect(all(k % 2 for k in kernel), f"{where} params.weight.shape", params.weight.shape, "odd K and L")
    expect(stats is None or params.norm is not None, f"{where} stats", stats, "None, as params.norm is")
    winner = x.real.argmax(axis=1)[:, None]
    pools = {"max": np.take_along_axis(x, winner, axis=1), "avg": x.mean(axis=1, keepdims=True)}
    q = np.concatenate([pools[kind] for kind in maps], axis=1)
    f, convolved = conv.forward(q, conv.Params(params.weight), padding=tuple(k // 2 for k in kernel))
    normed = None
    if params.norm is not None:
        f, normed = batch_norm.forward(f, params.norm, stats=stats)
    gate = sigmoid(f)
    return x * gate, Saved(x, gate, winner, convolved, normed, maps)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, gate, winner, convolved, normed, maps = saved
    dgate = np.einsum("nchw,nchw->nhw", dy, x)[:, None]
    df, dnorm = dgate * gate * (1 - gate), None
    if normed is not None:
        df, dnorm = batch_norm.backward(df, normed)
    dq, dconv = conv.backward(df, convolved)
    dmax, davg = dq[:, [maps.index("max")]], dq[:, [maps.index("avg")]]
    dx = dy * gate
    dx += davg / x.shape[1]
    np.put_along_axis(dx, winner, np.take_along_axis(dx, winner, axis=1) + dmax, axis=1)
    return dx, Params(dconv.weight, dnorm)


def example(draw):
    x = draw.array(draw.size("N", high=2), draw.size("C"), draw.size("H", low=2, high=3), draw.size("W", high=3))
    norm, stats = draw.choice("norm", "none", "training", "inference"), None
    params = draw.like(init(draw.rng, draw.choice("kernel", 1, 3, 7), norm != "none"))
    if norm == "inference":
        stats = batch_norm.example_stats(draw, 1)
    return Call((x, params), {"maps": draw.choice("maps", ("max", "avg"), ("avg", "max")), "stats": stats})


ABOUT = About(weights="gate", laws=("weights_in_unit_interval",), witnesses=("framework", "definition", "relation"))
