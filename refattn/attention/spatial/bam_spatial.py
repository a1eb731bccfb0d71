r"""The spatial branch of BAM.

Add to every pixel itself, scaled by a gate computed from a wide surrounding by dilated convolutions.

Paper: Park, Woo, Lee and Kweon, "BAM: Bottleneck Attention Module", BMVC 2018 (arXiv:1807.06514), section 3.1,
spatial attention branch.

Shapes
    N images, C channels, H by W pixels, M = C / reduction hidden channels; l counts the dilated blocks.

Forward
    h_0    = conv_norm_relu(x)                1 by 1, to M channels
    h_l    = conv_norm_relu(h_{l-1})          3 by 3, dilated, as large as x
    f_nij  = conv(h_last)                     1 by 1, to one channel: the logits
    g_nij  = sigmoid(f)
    y_ncij = x_ncij (1 + g_nij)

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nij  = sum_c ybar_ncij x_ncij
    fbar      = gbar g (1 - g)
    hbar_last, hbar_{l-1}, xbar = the gradients of the convolutions and blocks, from the last to the first
    xbar_ncij = ybar_ncij (1 + g_nij), and what comes out of the first block

Choices
    BAM needs only the logits of its two branches: `logits` and `logits_backward`. `forward` is one branch alone.
    The paper has one batch normalisation, after the last convolution; the authors' code one in every block, as here.
    stats=None is training, given Stats are inference.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import sigmoid
from refattn.primitives import batch_norm, conv, conv_norm_relu


class Params(NamedTuple):
    reduce: conv_norm_relu.Params
    dilated: tuple[conv_norm_relu.Params, ...]
    final: conv.Params


class Stats(NamedTuple):
    reduce: batch_norm.Stats
    dilated: tuple[batch_norm.Stats, ...]


class SavedLogits(NamedTuple):
    reduce: conv_norm_relu.Saved
    dilated: tuple[conv_norm_relu.Saved, ...]
    final: conv.Saved


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    gate: Shaped[Array, "N 1 H W"]
    logits: SavedLogits


def init(rng, channels, reduction=16, dilated=2):
    """Each part as its own file starts it."""
    hidden = max(channels // reduction, 1)
    return Params(
        reduce=conv_norm_relu.init(rng, channels, hidden, (1, 1), bias=True),
        dilated=tuple(conv_norm_relu.init(rng, hidden, hidden, (3, 3), bias=True) for _ in range(dilated)),
        final=conv.init(rng, hidden, 1, (1, 1)),
    )


def init_stats(params):
    """The running statistics before the first batch."""
    reduce, *dilated = (batch_norm.init_stats(len(block.norm.beta)) for block in (params.reduce, *params.dilated))
    return Stats(reduce, tuple(dilated))


@shaped
def logits(
    x: Shaped[Array, "N C H W"], params: Params, *, dilation: int = 4, stats: Stats | None = None
) -> tuple[Shaped[Array, "N 1 H W"], SavedLogits]:
    where, blocks = "bam_spatial.forward:", len(params.dilated)
    reduce_stats, dilated_stats = (None, (None,) * blocks) if stats is None else stats
    expect(len(dilated_stats) == blocks, f"{where} stats.dilated", dilated_stats, f"{blocks} batch_norm.Stats")
    kernels = [block.conv.weight.shape[2:] for block in params.dilated]
    expect(all(k == (3, 3) for k in kernels), f"{where} kernels of params.dilated", kernels, "3 by 3 only")
    h, reduce = conv_norm_relu.forward(x, params.reduce, stats=reduce_stats)
    dilated = []
    for block, block_stats in zip(params.dilated, dilated_stats):
        h, saved = conv_norm_relu.forward(h, block, stats=block_stats, padding=dilation, dilation=dilation)
        dilated.append(saved)
    f, final = conv.forward(h, params.final)
    return f, SavedLogits(reduce, tuple(dilated), final)


@shaped
def logits_backward(df: Shaped[Array, "N 1 H W"], saved: SavedLogits) -> tuple[Shaped[Array, "N C H W"], Params]:
    dh, dfinal = conv.backward(df, saved.final)
    ddilated = []
    for block in reversed(saved.dilated):
        dh, dblock = conv_norm_relu.backward(dh, block)
        ddilated.append(dblock)
    dx, dreduce = conv_norm_relu.backward(dh, saved.reduce)
    return dx, Params(dreduce, tuple(reversed(ddilated)), dfinal)


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Params, *, dilation: int = 4, stats: Stats | None = None
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    f, saved = logits(x, params, dilation=dilation, stats=stats)
    gate = sigmoid(f)
    return x * (1 + gate), Saved(x, gate, saved)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, gate, inner = saved
    dgate = np.einsum("nchw,nchw->nhw", dy, x)[:, None]
    df = dgate * gate * (1 - gate)
    dx, dparams = logits_backward(df, inner)
    return dy * (1 + gate) + dx, dparams


def example(draw):
    training = draw.choice("training", True, False, False)
    channels, dilated = draw.size("C", low=2, high=5), draw.choice("dilated", 2, 1, 0)
    shape = draw.size("N", low=2, high=3), channels, draw.size("H", low=2, high=3), draw.size("W", low=2, high=3)
    params = init(draw.rng, channels, draw.choice("reduction", 1, 2), dilated)
    start = draw.rng.normal(size=shape), params  # batch normalisation is near singular where nothing varies
    x, params = tree_map(lambda s, d: s + d / 4, start, draw.like(start))
    stats = None
    if not training:
        stats = init_stats(params)  # means 0, variances 1
        stats = tree_map(lambda s, d: np.where(s > 0, d * d + 0.5, d), stats, draw.like(stats))
    return Call((x, params), {"dilation": draw.size("dilation", high=2), "stats": stats})


ABOUT = About(weights="gate", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
