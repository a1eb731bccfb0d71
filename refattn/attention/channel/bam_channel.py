r"""The channel branch of BAM.

Add to every channel itself, scaled by a gate computed from the means of all channels.

Paper: Park, Woo, Lee and Kweon, "BAM: Bottleneck Attention Module", BMVC 2018 (arXiv:1807.06514), section 3.1,
channel attention branch.

Shapes
    N images, C channels, H by W pixels, M = C / reduction hidden units; l counts the hidden layers.

Forward
    z_nc   = mean of x_ncij over the pixels of a window
    h_l    = conv_norm_relu(h_{l-1})          a convolution without space: W_l h_{l-1} + b_l;   h_0 = z
    e_nc   = W h_last + b                     the logits
    g_nc   = sigmoid(e)
    y_ncij = x_ncij (1 + g_nc)

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nc   = sum_ij ybar_ncij x_ncij
    ebar      = gbar g (1 - g)
    hbar_last = ebar W,   hbar_{l-1} = the gradient of block l of hbar_l
    xbar_ncij = ybar_ncij (1 + g_nc), and zbar_nc / (size of the window) inside the window

Choices
    BAM needs only the logits of its two branches: `logits` and `logits_backward`. `forward` is one branch alone.
    The authors' code averages over a square window of H by H pixels, pool="square": all pixels where H = W, the first H
    columns where H < W < 2H, and an error elsewhere. pool="global" averages over all pixels, as the paper says.
    The paper has one batch normalisation, after the last layer; the authors' code one in every hidden layer, as here.
    stats=None is training, which needs N > 1; given Stats are inference.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.elementwise import sigmoid
from refattn.primitives import batch_norm, conv_norm_relu, linear


class Params(NamedTuple):
    hidden: tuple[conv_norm_relu.Params, ...]  # (M, C), (M, M), ...: a convolution without space is a linear map
    final: Shaped[linear.Params, "O=C"]


class Stats(NamedTuple):
    hidden: tuple[batch_norm.Stats, ...]


class SavedLogits(NamedTuple):
    window: tuple  # shape of x, rows, columns
    hidden: tuple[conv_norm_relu.Saved, ...]
    final: linear.Saved


class Saved(NamedTuple):
    x: Shaped[Array, "N C H W"]
    gate: Shaped[Array, "N C"]
    logits: SavedLogits


def init(rng, channels, reduction=16, layers=1):
    """Each part as its own file starts it."""
    widths = [channels, *[max(channels // reduction, 1)] * layers]
    hidden = tuple(conv_norm_relu.init(rng, i, o, (), bias=True) for i, o in pairwise(widths))
    return Params(hidden, linear.init(rng, widths[-1], channels))


def init_stats(params):
    """The running statistics before the first batch."""
    return Stats(tuple(batch_norm.init_stats(len(block.norm.beta)) for block in params.hidden))


@shaped
def logits(
    x: Shaped[Array, "N C H W"], params: Params, *, pool: str = "square", stats: Stats | None = None
) -> tuple[Shaped[Array, "N C"], SavedLogits]:
    blocks = len(params.hidden)
    every = (None,) * blocks if stats is None else stats.hidden
    expect(len(every) == blocks, "bam_channel.forward: stats.hidden", every, f"{blocks} batch_norm.Stats")
    rows, columns = _window(x, pool)
    z = x[:, :, :rows, :columns].mean(axis=(2, 3))
    h, hidden = z, []
    for block, block_stats in zip(params.hidden, every):
        h, saved = conv_norm_relu.forward(h, block, stats=block_stats)
        hidden.append(saved)
    e, final = linear.forward(h, params.final)
    return e, SavedLogits((x.shape, rows, columns), tuple(hidden), final)


@shaped
def logits_backward(de: Shaped[Array, "N C"], saved: SavedLogits) -> tuple[Shaped[Array, "N C H W"], Params]:
    (shape, rows, columns), hidden, final = saved
    dh, dfinal = linear.backward(de, final)
    dhidden = []
    for block in reversed(hidden):
        dh, dblock = conv_norm_relu.backward(dh, block)
        dhidden.append(dblock)
    dx = np.zeros_like(dh, shape=shape)
    dx[:, :, :rows, :columns] = dh[:, :, None, None] / (rows * columns)
    return dx, Params(tuple(reversed(dhidden)), dfinal)


@shaped
def forward(
    x: Shaped[Array, "N C H W"], params: Params, *, pool: str = "square", stats: Stats | None = None
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    e, saved = logits(x, params, pool=pool, stats=stats)
    gate = sigmoid(e)
    return x * (1 + gate[:, :, None, None]), Saved(x, gate, saved)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    x, gate, inner = saved
    dgate = np.einsum("nchw,nchw->nc", dy, x)
    de = dgate * gate * (1 - gate)
    dx, dparams = logits_backward(de, inner)
    return dy * (1 + gate[:, :, None, None]) + dx, dparams


def _window(x, pool):
    height, width = x.shape[2:]
    expect(pool in ("square", "global"), "bam_channel.forward: pool", pool, "'square' or 'global'")
    fits = pool == "global" or height <= width < 2 * height
    expect(fits, "bam_channel.forward: x.shape", x.shape, "H <= W < 2 H with pool='square'; or pool='global'")
    return height, width if pool == "global" else height


def example(draw):
    height, pool = draw.size("H", high=3), draw.choice("pool", "square", "global")
    width = draw.size("W", *((1, 3) if pool == "global" else (height, 2 * height - 1)))
    channels, training = draw.size("C", low=2, high=5), draw.choice("training", True, False, False)
    shape = draw.size("N", low=3 if training else 1), channels, height, width
    params = init(draw.rng, channels, draw.choice("reduction", 1, 2), draw.choice("layers", 2, 1, 0))
    start = draw.rng.normal(size=shape), params  # batch normalisation is near singular where nothing varies
    x, params = tree_map(lambda s, d: s + d / 4, start, draw.like(start))
    stats = None
    if not training:
        stats = init_stats(params)  # means 0, variances 1
        stats = tree_map(lambda s, d: np.where(s > 0, d * d + 0.5, d), stats, draw.like(stats))
    return Call((x, params), {"pool": pool, "stats": stats})


ABOUT = About(weights="gate", laws=("weights_in_unit_interval",), witnesses=("definition", "relation"))
