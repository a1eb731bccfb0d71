r"""Efficient channel attention (ECA).

Scale every channel by a gate computed from the global means of its nearest channels: a convolution along channels.

Paper: Wang, Wu, Zhu, Li, Zuo and Hu, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
CVPR 2020 (arXiv:1910.03151).

Shapes
    N images, C channels, H by W pixels, K taps (odd); F = 1 filter shared by all channels, or F = C, one for each.

Forward
    z_nc   = 1/(HW) sum_ij x_ncij
    e_nc   = b + sum_k w_k z_n,c+k-r          r = (K - 1) / 2; z is 0 beyond the first and the last channel
    g_nc   = sigmoid(e_nc)
    y_ncij = g_nc x_ncij

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nc   = sum_ij ybar_ncij x_ncij
    ebar      = gbar g (1 - g)
    wbar_k    = sum_nc ebar_nc z_n,c+k-r,   bbar = sum_nc ebar_nc             with F = C: no sum over c
    zbar_nc   = sum_k w_k ebar_n,c-k+r        what z_c+s gave to c, c gives back to c+s
    xbar_ncij = ybar_ncij g_nc + zbar_nc / (HW)

Choices
    F = C is the authors' second module ("ns", not shared). No bias in the authors' code; some ports have one.
    circular=True closes the channels to a ring instead of padding with zeros (cECA, in timm).
    K is an argument of the authors' module, 3 unless given; the paper's rule, which `adaptive_kernel` is, lies outside
    it. Where the rule gives 1, for the fewest channels, timm takes 3.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.elementwise import sigmoid


class Params(NamedTuple):
    weight: Shaped[Array, "F K"]
    bias: Shaped[Array, "F"] | None = None


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    z: Shaped[Array, "N C"]
    gate: Shaped[Array, "N C"]
    params: Params
    circular: bool


def adaptive_kernel(channels, gamma=2, b=1):
    """K that grows with the logarithm of C: t = floor(|log2(C) + b| / gamma), or t + 1 where t is even."""
    t = int(abs((math.log2(channels) + b) / gamma))
    return t if t % 2 else t + 1


def init(rng, channels, kernel=None, shared=True, bias=False):
    """Normal weights of variance 1 / K, zero bias; K by `adaptive_kernel` where none is given."""
    kernel, filters = kernel or adaptive_kernel(channels), 1 if shared else channels
    return Params(rng.normal(size=(filters, kernel)) / math.sqrt(kernel), np.zeros(filters) if bias else None)


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Params, *, circular: bool = False
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    weight, bias = params
    (filters, kernel), channels = weight.shape, x.shape[1]
    where = "efficient_channel.forward: params.weight.shape"
    expect(filters in (1, channels), where, weight.shape, f"one filter, or one for each of the C = {channels} of x")
    expect(kernel % 2 == 1, where, weight.shape, "an odd number K of taps")
    z = x.mean(axis=(2, 3))
    e = sum(weight[:, k] * _shift(z, k - kernel // 2, circular) for k in range(kernel))
    gate = sigmoid(e + (0 if bias is None else bias))
    return x * gate[:, :, None, None], Saved(x, z, gate, params, circular)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, z, gate, (weight, bias), circular = saved
    filters, kernel = weight.shape
    dgate = np.einsum("nchw,nchw->nc", dy, x)
    de = dgate * gate * (1 - gate)
    taps = [de * _shift(z, k - kernel // 2, circular) for k in range(kernel)]
    dweight = np.stack([_per_filter(tap, filters) for tap in taps], axis=1)
    dbias = None if bias is None else _per_filter(de, filters)
    dz = sum(_shift(weight[:, k] * de, kernel // 2 - k, circular) for k in range(kernel))
    dx = dy * gate[:, :, None, None]
    dx += (dz / (x.shape[2] * x.shape[3]))[:, :, None, None]
    return dx, Params(dweight, dbias)


def _shift(z, step, circular):
    """The channel `step` further, for every channel: z_n,c+step. Its transpose is the shift back."""
    if circular:
        return np.roll(z, -step, axis=1)
    reach = abs(step)
    return np.pad(z, ((0, 0), (reach, reach)))[:, reach + step : reach + step + z.shape[1]]


def _per_filter(values, filters):
    """(N, C) summed over whatever shares a filter: (F,)."""
    return values.sum(axis=0) if filters > 1 else values.sum().reshape(1)


def example(draw):
    channels, kernel = draw.size("C", high=5), draw.choice("K", 1, 3, 5)
    x = draw.array(draw.size("N"), channels, draw.size("H"), draw.size("W"))
    params = init(draw.rng, channels, kernel, draw.choice("shared", True, False), draw.choice("bias", False, True))
    return Call((x, draw.like(params)), {"circular": draw.choice("circular", False, True)})


ABOUT = About(
    weights="gate",
    laws=("batch_independent", "weights_in_unit_interval", "pixel_permutation_equivariant"),
    witnesses=("authors' code", "framework", "definition", "relation"),
)
