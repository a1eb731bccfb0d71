r"""Convolutional block attention module (CBAM).

What to look at, then where to look: a channel gate, and a spatial gate on what it lets through.

Paper: Woo, Park, Lee and Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018 (arXiv:1807.06521),
section 3, equation 1.

Shapes
    N images, C channels, H by W pixels.

Forward
    x' = cbam_channel(x)
    y  = cbam_spatial(x')

Backward, with a bar for "gradient of the loss with respect to"
    x'bar = the spatial gate's gradient of ybar
    xbar  = the channel gate's gradient of x'bar

Choices
    params.spatial=None stops after the channel gate, as no_spatial=True does in the authors' code.
    Paper and code differ in the biases of the MLP (params.channel), in the order of the two maps (maps) and in the
    batch normalisation (params.spatial.norm): see the files of the two gates.
"""

from typing import NamedTuple

from refattn.attention.channel import cbam_channel
from refattn.attention.spatial import cbam_spatial
from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import batch_norm


class Params(NamedTuple):
    channel: Shaped[cbam_channel.Params, "C=C"]
    spatial: cbam_spatial.Params | None = None


class Saved(NamedTuple):
    channel: cbam_channel.Saved
    spatial: cbam_spatial.Saved | None
    channel_gate: Shaped[Array, "N C"]
    spatial_gate: Shaped[Array, "N 1 H W"] | None


def init(rng, channels, reduction=16, kernel=7, spatial=True):
    """Each gate as its own file starts it."""
    return Params(cbam_channel.init(rng, channels, reduction), cbam_spatial.init(rng, kernel) if spatial else None)


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    pools: tuple = ("avg", "max"),
    maps: tuple = ("max", "avg"),
    stats: batch_norm.Stats | None = None,
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    expect(stats is None or params.spatial is not None, "cbam.forward: stats", stats, "None, as params.spatial is")
    y, channel = cbam_channel.forward(x, params.channel, pools=pools)
    if params.spatial is None:
        return y, Saved(channel, None, channel.gate, None)
    y, spatial = cbam_spatial.forward(y, params.spatial, maps=maps, stats=stats)
    return y, Saved(channel, spatial, channel.gate, spatial.gate)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    dspatial = None
    if saved.spatial is not None:
        dy, dspatial = cbam_spatial.backward(dy, saved.spatial)
    dx, dchannel = cbam_channel.backward(dy, saved.channel)
    return dx, Params(dchannel, dspatial)


def example(draw):
    (x, spatial), options = cbam_spatial.example(draw)
    bias, pools = draw.choice("bias", True, False), draw.choice("pools", ("avg", "max"), ("lse", "max", "lp"))
    channel = draw.like(cbam_channel.init(draw.rng, x.shape[1], draw.choice("reduction", 1, 2), bias))
    if draw.choice("spatial gate", True, True, False):
        return Call((x, Params(channel, spatial)), {"pools": pools, **options})
    return Call((x, Params(channel)), {"pools": pools})


ABOUT = About(
    weights="channel_gate",
    laws=("weights_in_unit_interval",),
    witnesses=("authors' code", "framework", "definition", "relation"),
)
