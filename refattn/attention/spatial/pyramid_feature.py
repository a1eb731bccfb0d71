r"""Pyramid feature attention head (PFANet).

From five feature maps of halving size to one map of saliency: context and channel attention for the three deep maps,
and spatial attention, computed from the deep ones, for the two shallow maps.

Paper: Zhao and Wu, "Pyramid Feature Attention Network for Saliency Detection", CVPR 2019 (arXiv:1903.00179),
section 3.

Shapes
    N images; c1 has H by W pixels, c2 half of that in both directions, and so on to c5 with a sixteenth.

Forward, with block for max(batch_norm(conv), 0) and up_k for bilinear upsampling by k
    f_3, f_4, f_5 = context_feature_extraction of c3, c4, c5
    p    = pyramid_channel(join(f_3, up_2(f_4), up_4(f_5)))
    high = up_4(block(p))                                         1 x 1
    low  = block(join(block(c1), up_2(block(c2))))                3 x 3
    m    = pyramid_spatial(high)
    y    = conv(join(m low, high))                                3 x 3, 1 channel: logits

Backward, with a bar for "gradient of the loss with respect to"
    gatedbar, highbar = the convolution's gradient of ybar, cut in two
    lowbar = gatedbar m,   mbar = gatedbar low
    highbar = highbar + pyramid_spatial's gradient of mbar
    c1bar, c2bar = the blocks' gradients of lowbar, cut in two
    c3bar, c4bar, c5bar = the gradients of pbar through channel attention and context, cut in three

Choices
    The spatial map is computed from the high-level features and applied to the low-level ones, as in the release;
    readers of the paper have expected it to be computed from the low-level ones.
    y is before the sigmoid, which belongs to the loss. Upsampling lets corners meet corners (align_corners=True).
    relu: see pyramid_spatial. stats=None, the batch's own statistics, is what the release uses in inference too.
    eps = 1e-3, as in Keras.
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.channel import squeeze_excitation
from refattn.attention.spatial import context_feature_extraction, pyramid_channel, pyramid_spatial
from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import batch_norm, bilinear_resize, conv, conv_norm_relu


class Params(NamedTuple):
    context3: context_feature_extraction.Params
    context4: context_feature_extraction.Params
    context5: context_feature_extraction.Params
    channel: squeeze_excitation.Params
    high: conv_norm_relu.Params
    spatial: pyramid_spatial.Params
    low1: conv_norm_relu.Params
    low2: conv_norm_relu.Params
    low: conv_norm_relu.Params
    out: conv.Params


class Stats(NamedTuple):
    context3: batch_norm.Stats
    context4: batch_norm.Stats
    context5: batch_norm.Stats
    high: batch_norm.Stats
    spatial: pyramid_spatial.Stats
    low1: batch_norm.Stats
    low2: batch_norm.Stats
    low: batch_norm.Stats


class Saved(NamedTuple):
    context3: context_feature_extraction.Saved
    context4: context_feature_extraction.Saved
    context5: context_feature_extraction.Saved
    up4: bilinear_resize.Saved
    up5: bilinear_resize.Saved
    channel: pyramid_channel.Saved
    high: conv_norm_relu.Saved
    up_high: bilinear_resize.Saved
    spatial: pyramid_spatial.Saved
    low1: conv_norm_relu.Saved
    low2: conv_norm_relu.Saved
    up2: bilinear_resize.Saved
    low: conv_norm_relu.Saved
    weights: Shaped[Array, "N M H W"]  # the spatial map m
    out: conv.Saved


def init(rng, channels, filters=32, width=64, kernel=9):
    """Each part as its own file starts it; `channels` are those of c1 to c5."""

    def block(inputs, side):
        return conv_norm_relu.init(rng, inputs, width, (side, side), bias=True)

    contexts = [context_feature_extraction.init(rng, c, filters) for c in channels[2:]]
    joined = sum(len(context.norm.gamma) for context in contexts)
    return Params(
        *contexts,
        channel=squeeze_excitation.init(rng, joined, reduction=4),
        high=block(joined, 1),
        spatial=pyramid_spatial.init(rng, width, kernel),
        low1=block(channels[0], 3),
        low2=block(channels[1], 3),
        low=block(2 * width, 3),
        out=conv.init(rng, 2 * width, 1, (3, 3)),
    )


@shaped
def forward(
    c1: Shaped[Array, "N C1 H W"],
    c2: Shaped[Array, "N C2 H2 W2"],
    c3: Shaped[Array, "N C3 H3 W3"],
    c4: Shaped[Array, "N C4 H4 W4"],
    c5: Shaped[Array, "N C5 H5 W5"],
    params: Params,
    *,
    relu: bool = True,
    stats: Stats | None = None,
    eps: float = 1e-3,
) -> tuple[Shaped[Array, "N 1 H W"], Saved]:
    _check(c1, {"c2": c2, "c3": c3, "c4": c4, "c5": c5}, params)
    stats = stats or Stats(*(None for _ in Stats._fields))

    f3, context3 = context_feature_extraction.forward(c3, params.context3, stats=stats.context3, eps=eps)
    f4, context4 = context_feature_extraction.forward(c4, params.context4, stats=stats.context4, eps=eps)
    f5, context5 = context_feature_extraction.forward(c5, params.context5, stats=stats.context5, eps=eps)
    f4, up4 = _up(f4, 2)
    f5, up5 = _up(f5, 4)
    p, channel = pyramid_channel.forward(np.concatenate([f3, f4, f5], axis=1), params.channel)
    high, saved_high = conv_norm_relu.forward(p, params.high, stats=stats.high, eps=eps)
    high, up_high = _up(high, 4)
    m, spatial = pyramid_spatial.forward(high, params.spatial, relu=relu, stats=stats.spatial, eps=eps)

    l1, low1 = conv_norm_relu.forward(c1, params.low1, stats=stats.low1, padding=1, eps=eps)
    l2, low2 = conv_norm_relu.forward(c2, params.low2, stats=stats.low2, padding=1, eps=eps)
    l2, up2 = _up(l2, 2)
    low, saved_low = conv_norm_relu.forward(
        np.concatenate([l1, l2], axis=1), params.low, stats=stats.low, padding=1, eps=eps
    )
    y, out = conv.forward(np.concatenate([m * low, high], axis=1), params.out, padding=1)
    return y, Saved(
        *(context3, context4, context5, up4, up5, channel, saved_high, up_high, spatial),
        *(low1, low2, up2, saved_low, m, out),
    )


@shaped
def backward(
    dy: Shaped[Array, "N 1 H W"], saved: Saved
) -> tuple[
    Shaped[Array, "N C1 H W"],
    Shaped[Array, "N C2 H2 W2"],
    Shaped[Array, "N C3 H3 W3"],
    Shaped[Array, "N C4 H4 W4"],
    Shaped[Array, "N C5 H5 W5"],
    Params,
]:
    dgated_and_high, dout = conv.backward(dy, saved.out)
    dgated, dhigh = np.split(dgated_and_high, 2, axis=1)
    dhigh_spatial, dspatial = pyramid_spatial.backward(dgated * saved.low.y, saved.spatial)

    dl1_and_l2, dlow = conv_norm_relu.backward(dgated * saved.weights, saved.low)
    dl1, dl2 = np.split(dl1_and_l2, [saved.low1.y.shape[1]], axis=1)
    dc1, dlow1 = conv_norm_relu.backward(dl1, saved.low1)
    dc2, dlow2 = conv_norm_relu.backward(*bilinear_resize.backward(dl2, saved.up2), saved.low2)

    (dhigh,) = bilinear_resize.backward(dhigh + dhigh_spatial, saved.up_high)
    dp, dhigh = conv_norm_relu.backward(dhigh, saved.high)
    djoined, dchannel = pyramid_channel.backward(dp, saved.channel)
    first, second = saved.context3.y.shape[1], saved.context4.y.shape[1]
    df3, df4, df5 = np.split(djoined, [first, first + second], axis=1)
    dc3, dcontext3 = context_feature_extraction.backward(df3, saved.context3)
    dc4, dcontext4 = context_feature_extraction.backward(*bilinear_resize.backward(df4, saved.up4), saved.context4)
    dc5, dcontext5 = context_feature_extraction.backward(*bilinear_resize.backward(df5, saved.up5), saved.context5)
    dparams = Params(dcontext3, dcontext4, dcontext5, dchannel, dhigh, dspatial, dlow1, dlow2, dlow, dout)
    return dc1, dc2, dc3, dc4, dc5, dparams


def _up(x, factor):
    return bilinear_resize.forward(x, size=tuple(factor * s for s in x.shape[2:]), align_corners=True)


def _check(c1, deeper, params):
    where = "pyramid_feature.forward:"
    for (name, image), share in zip(deeper.items(), (2, 4, 8, 16)):
        fits = tuple(share * side for side in image.shape[2:]) == c1.shape[2:]
        expect(fits, f"{where} {name}.shape", image.shape, f"H / {share} and W / {share} of c1, {c1.shape}")
    for name, side in (("high", 1), ("low1", 3), ("low2", 3), ("low", 3)):
        shape, what = getattr(params, name).conv.weight.shape, f"{where} params.{name}.conv.weight.shape"
        expect(shape[2:] == (side, side), what, shape, f"a {side} x {side} kernel")
    high, low = (p.conv.weight.shape for p in (params.high, params.low))
    expect(high[0] == low[0], f"{where} params.low.conv.weight.shape", low, f"as many outputs as params.high, {high}")


def example(draw):
    """In half of the examples no ReLU is near its kink: in the others there is one within every step of differences."""
    channels = (*(draw.size(f"C{i}", high=2) for i in (1, 2, 3)), 1, 1)
    n, h, w = draw.size("N", low=2, high=3), 1, draw.choice("W / 16", 1, 2)
    features = (draw.array(n, c, h * 2**i, w * 2**i) for i, c in zip((4, 3, 2, 1, 0), channels))
    params = init(draw.rng, channels, filters=1, width=draw.size("width", high=2), kernel=draw.choice("k", 1, 3))
    params = tree_map(lambda p: p / 4, draw.like(params))
    if draw.choice("ReLUs are decided", True, False):
        params = _decided(params)
    options = {"relu": draw.choice("relu", True, False), "eps": draw.choice("eps", 0.01, 0.5)}
    if draw.choice("mode", "training", "inference") == "inference":
        stats = {name: _example_stats(draw, getattr(params, name)) for name in Stats._fields}
        options["stats"] = Stats(**stats)
    return Call((*features, params), options)


def _decided(params):
    """Whole channels that are on or off: little gamma, much beta."""
    if isinstance(params, batch_norm.Params):
        return batch_norm.Params(params.gamma / 32, params.beta + np.where(params.beta < -0.5, -1, 1.5))
    if not isinstance(params, tuple):
        return params
    children = map(_decided, params)
    return type(params)(*children) if hasattr(params, "_fields") else tuple(children)


def _example_stats(draw, params):
    if isinstance(params, pyramid_spatial.Params):
        return pyramid_spatial.example_stats(draw, params)
    return batch_norm.example_stats(draw, len(params.norm.gamma))


ABOUT = About(weights="weights", laws=("weights_in_unit_interval",), witnesses=("authors' code", "definition"))
