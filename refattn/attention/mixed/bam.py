r"""Bottleneck attention module (BAM).

Add to every pixel of every channel itself, scaled by one gate: what to look at and where to look, decided in parallel.

Paper: Park, Woo, Lee and Kweon, "BAM: Bottleneck Attention Module", BMVC 2018 (arXiv:1807.06514), section 3.

Shapes
    N images, C channels, H by W pixels.

Forward
    c_nc   = the logits of bam_channel
    f_nij  = the logits of bam_spatial
    a_ncij = c_nc f_nij                       or c_nc + f_nij
    g_ncij = sigmoid(a)
    y_ncij = x_ncij (1 + g_ncij)

Backward, with a bar for "gradient of the loss with respect to"
    abar_ncij = ybar_ncij x_ncij g (1 - g)
    cbar_nc   = sum_ij abar_ncij f_nij        or sum_ij abar_ncij
    fbar_nij  = sum_c abar_ncij c_nc          or sum_c abar_ncij
    xbar_ncij = ybar_ncij (1 + g_ncij), and the gradients of the two branches, of cbar and fbar

Choices
    The authors' code multiplies the logits, combine="mul"; the paper adds them, combine="add".
    pool and the place of batch normalisation: see bam_channel.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.channel import bam_channel
from refattn.attention.spatial import bam_spatial
from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import sigmoid


class Params(NamedTuple):
    channel: bam_channel.Params
    spatial: bam_spatial.Params


class Stats(NamedTuple):
    channel: bam_channel.Stats
    spatial: bam_spatial.Stats


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    c: Shaped[Array, "N C 1 1"]
    f: Shaped[Array, "N 1 H W"]
    gate: Shaped[Array, "N C H W"]
    channel: bam_channel.SavedLogits
    spatial: bam_spatial.SavedLogits
    combine: str


def init(rng, channels, reduction=16, layers=1, dilated=2):
    """Each branch as its own file starts it."""
    channel = bam_channel.init(rng, channels, reduction, layers)
    return Params(channel, bam_spatial.init(rng, channels, reduction, dilated))


def init_stats(params):
    """The running statistics before the first batch."""
    return Stats(bam_channel.init_stats(params.channel), bam_spatial.init_stats(params.spatial))


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    combine: str = "mul",
    pool: str = "square",
    dilation: int = 4,
    stats: Stats | None = None,
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    expect(combine in ("mul", "add"), "bam.forward: combine", combine, "'mul' or 'add'")
    channel_stats, spatial_stats = (None, None) if stats is None else stats
    c, channel = bam_channel.logits(x, params.channel, pool=pool, stats=channel_stats)
    f, spatial = bam_spatial.logits(x, params.spatial, dilation=dilation, stats=spatial_stats)
    c = c[:, :, None, None]
    gate = sigmoid(c * f if combine == "mul" else c + f)
    return x * (1 + gate), Saved(x, c, f, gate, channel, spatial, combine)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, c, f, gate, channel, spatial, combine = saved
    da = dy * x * gate * (1 - gate)
    dc, df = (da * f, da * c) if combine == "mul" else (da, da)
    dx_channel, dchannel = bam_channel.logits_backward(dc.sum(axis=(2, 3)), channel)
    dx_spatial, dspatial = bam_spatial.logits_backward(df.sum(axis=1, keepdims=True), spatial)
    return dy * (1 + gate) + dx_channel + dx_spatial, Params(dchannel, dspatial)


def example(draw):
    channels, height = draw.size("C", low=3), draw.size("H", low=2, high=3)
    shape = draw.size("N", low=3, high=3), channels, height, draw.size("W", low=height, high=3)
    params = init(draw.rng, channels, 2, draw.size("layers", low=0, high=1), draw.size("dilated", low=0, high=1))
    start = draw.rng.normal(size=shape), params  # batch normalisation is near singular where nothing varies
    x, params = tree_map(lambda s, d: s + d / 4, start, draw.like(start))
    stats = None
    if draw.choice("mode", "training", "inference", "inference again") != "training":
        stats = init_stats(params)  # means 0, variances 1
        stats = tree_map(lambda s, d: np.where(s > 0, d * d + 0.5, d), stats, draw.like(stats))
    options = {
        "combine": draw.choice("combine", "mul", "add"),
        "pool": draw.choice("pool", "square", "global"),
        "dilation": draw.size("dilation", high=2),
        "stats": stats,
    }
    return Call((x, params), options)


ABOUT = About(weights="gate", laws=("weights_in_unit_interval",), witnesses=("authors' code", "definition", "relation"))
