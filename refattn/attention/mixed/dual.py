r"""Dual attention: the head of DANet.

Two branches side by side, one attending to pixels, one to channels; three classifiers look at their sum and at each.

Paper: Fu, Liu, Tian, Li, Bao, Fang and Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019
(arXiv:1809.02983), sections 3.1 and 3.4.

Shapes
    N images, C channels in, M = C / 4 channels inside, O classes out, H by W pixels.

Forward
    p0, c0    = conv_norm_relu(x) of each branch            3 by 3, to M channels
    p1        = position(p0),   c1 = channel_self(c0)
    p, c      = conv_norm_relu of p1 and of c1              3 by 3, M channels
    sum       = p + c
    both, position, channel = conv of dropout of sum, of p and of c             1 by 1, to O classes

Backward, with a bar for "gradient of the loss with respect to"
    sumbar, pbar, cbar = dropout of the convolutions' gradients of bothbar, positionbar and channelbar
    pbar, cbar both grow by sumbar
    p1bar, p0bar, xbar from pbar, and the same from cbar: each block's gradient of the next; both branches add to xbar

Choices
    The outputs come in the order of the authors' release: of the sum, of the position branch, of the channel branch.
    Its dropout drops whole channels, a tenth of them: dropout holds the factors, 0 or 1 / 0.9; None is none.
    sign=1 is the paper's channel attention: see channel_self.
    stats=None is training, given Stats are inference.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.channel import channel_self
from refattn.attention.spatial import position
from refattn.core import About, Array, Call, Shaped, shaped, tree_map
from refattn.primitives import batch_norm, conv, conv_norm_relu


class Params(NamedTuple):
    position_in: conv_norm_relu.Params
    position: position.Params
    position_out: conv_norm_relu.Params
    channel_in: conv_norm_relu.Params
    channel: channel_self.Params
    channel_out: conv_norm_relu.Params
    classify_both: conv.Params
    classify_position: conv.Params
    classify_channel: conv.Params


class Stats(NamedTuple):
    position_in: batch_norm.Stats
    position_out: batch_norm.Stats
    channel_in: batch_norm.Stats
    channel_out: batch_norm.Stats


class Dropout(NamedTuple):
    both: Shaped[Array, "N M"] | None = None
    position: Shaped[Array, "N M"] | None = None
    channel: Shaped[Array, "N M"] | None = None


class Out(NamedTuple):
    both: Shaped[Array, "N O H W"]
    position: Shaped[Array, "N O H W"]
    channel: Shaped[Array, "N O H W"]


class Saved(NamedTuple):
    position_in: conv_norm_relu.Saved
    position: position.Saved
    position_out: conv_norm_relu.Saved
    channel_in: conv_norm_relu.Saved
    channel: channel_self.Saved
    channel_out: conv_norm_relu.Saved
    classify_both: conv.Saved
    classify_position: conv.Saved
    classify_channel: conv.Saved
    dropout: Dropout
    position_weights: Shaped[Array, "N P P"]
    channel_weights: Shaped[Array, "N M M"]


def init(rng, channels, outputs):
    """Each part as its own file starts it."""
    inner = max(channels // 4, 1)
    return Params(
        position_in=conv_norm_relu.init(rng, channels, inner, (3, 3)),
        position=position.init(rng, inner),
        position_out=conv_norm_relu.init(rng, inner, inner, (3, 3)),
        channel_in=conv_norm_relu.init(rng, channels, inner, (3, 3)),
        channel=channel_self.init(rng),
        channel_out=conv_norm_relu.init(rng, inner, inner, (3, 3)),
        classify_both=conv.init(rng, inner, outputs, (1, 1)),
        classify_position=conv.init(rng, inner, outputs, (1, 1)),
        classify_channel=conv.init(rng, inner, outputs, (1, 1)),
    )


def init_stats(params):
    """The running statistics before the first batch."""
    return Stats(*(batch_norm.init_stats(len(getattr(params, name).norm.beta)) for name in Stats._fields))


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    sign: int = -1,
    dropout: Dropout | None = None,
    stats: Stats | None = None,
) -> tuple[Out, Saved]:
    stats, dropout = stats or Stats(None, None, None, None), dropout or Dropout()
    p0, position_in = conv_norm_relu.forward(x, params.position_in, stats=stats.position_in, padding=1)
    p1, attended = position.forward(p0, params.position)
    p, position_out = conv_norm_relu.forward(p1, params.position_out, stats=stats.position_out, padding=1)

    c0, channel_in = conv_norm_relu.forward(x, params.channel_in, stats=stats.channel_in, padding=1)
    c1, mixed = channel_self.forward(c0, params.channel, sign=sign)
    c, channel_out = conv_norm_relu.forward(c1, params.channel_out, stats=stats.channel_out, padding=1)

    both, of_both = conv.forward(_drop(p + c, dropout.both), params.classify_both)
    alone, of_position = conv.forward(_drop(p, dropout.position), params.classify_position)
    other, of_channel = conv.forward(_drop(c, dropout.channel), params.classify_channel)
    branches = position_in, attended, position_out, channel_in, mixed, channel_out
    saved = Saved(*branches, of_both, of_position, of_channel, dropout, attended.weights, mixed.weights)
    return Out(both, alone, other), saved


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    dboth, dclassify_both = conv.backward(dout.both, saved.classify_both)
    dp, dclassify_position = conv.backward(dout.position, saved.classify_position)
    dc, dclassify_channel = conv.backward(dout.channel, saved.classify_channel)
    dsum = _drop(dboth, saved.dropout.both)
    dp = _drop(dp, saved.dropout.position) + dsum
    dc = _drop(dc, saved.dropout.channel) + dsum

    dp1, dposition_out = conv_norm_relu.backward(dp, saved.position_out)
    dp0, dposition = position.backward(dp1, saved.position)
    dx_position, dposition_in = conv_norm_relu.backward(dp0, saved.position_in)

    dc1, dchannel_out = conv_norm_relu.backward(dc, saved.channel_out)
    dc0, dchannel = channel_self.backward(dc1, saved.channel)
    dx_channel, dchannel_in = conv_norm_relu.backward(dc0, saved.channel_in)

    dbranches = dposition_in, dposition, dposition_out, dchannel_in, dchannel, dchannel_out
    return dx_position + dx_channel, Params(*dbranches, dclassify_both, dclassify_position, dclassify_channel)


def _drop(x, factors):
    """x (N, M, H, W) times factors (N, M)."""
    return x if factors is None else x * factors[:, :, None, None]


def example(draw):
    training = draw.choice("training", True, False, False)
    shape = draw.size("N", high=2), draw.size("C", high=2), draw.size("H", low=2, high=3), 2
    params = init(draw.rng, 8, draw.size("O", high=2))
    first = conv_norm_relu.init(draw.rng, shape[1], 2, (3, 3))
    params = params._replace(position_in=first, channel_in=first)
    start = draw.rng.normal(size=shape), params  # batch normalisation is near singular where nothing varies
    x, params = tree_map(lambda s, d: s + d / 4, start, draw.like(start))
    params = params._replace(position=params.position._replace(key=params.position.key._replace(bias=None)))
    stats = None
    if not training:
        stats = init_stats(params)  # means 0, variances 1
        stats = tree_map(lambda s, d: np.where(s > 0, d * d + 0.5, d), stats, draw.like(stats))
    factors = Dropout(*(2.0 * draw.mask(shape[0], 2) for _ in range(3)))
    options = {"sign": draw.choice("sign", -1, 1), "dropout": draw.choice("dropout", None, factors), "stats": stats}
    return Call((x, params), options)


ABOUT = About(
    weights="position_weights",
    laws=("weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("authors' code", "definition", "relation"),
)
