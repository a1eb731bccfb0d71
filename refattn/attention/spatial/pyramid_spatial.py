r"""Spatial attention of PFANet.

One gate per pixel, from two chains of a wide and a tall convolution: a large window for the price of two thin ones.

Paper: Zhao and Wu, "Pyramid Feature Attention Network for Saliency Detection", CVPR 2019 (arXiv:1903.00179),
section 3.3.

Shapes
    N images, C channels, H by W pixels; thin kernels of length k, C / 2 hidden channels.

Forward, for the chains wide_tall, (1, k) then (k, 1), and tall_wide, (k, 1) then (1, k)
    h = max(batch_norm(conv_1(x)), 0)          C / 2 channels
    u = batch_norm(conv_2(h))                  1 channel
    s = max(u, 0)
    g = sigmoid(s of wide_tall + s of tall_wide)
    y_ncij = g_nij                             the map itself, once for every channel

Backward, with a bar for "gradient of the loss with respect to"
    gbar_nij = sum_c ybar_ncij
    sbar = gbar g (1 - g)                      for both chains; 1 - g = sigmoid(-...), which does not cancel
    ubar = sbar [s > 0]
    hbar = conv_2's gradient of batch normalisation's gradient of ubar
    xbar = sum over the chains of the gradient of max(batch_norm(conv_1(x)), 0)

Choices
    relu=True, as in the release, cuts s at 0, so that g is at least 1/2; relu=False is the paper's formula, s = u.
    y is the map, to be multiplied elsewhere: see pyramid_feature.
    The release normalises by the batch's own statistics in inference too: that is stats=None, the default. Given
    stats are running ones. eps = 1e-3, as in Keras. relu'(0) = 0.
"""

from typing import NamedTuple

from refattn import elementwise
from refattn.core import About, Array, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import batch_norm, conv, conv_norm_relu


class Chain(NamedTuple):
    first: conv_norm_relu.Params
    second: conv_norm_relu.Params


class Params(NamedTuple):
    wide_tall: Chain
    tall_wide: Chain


class ChainStats(NamedTuple):
    first: batch_norm.Stats
    second: batch_norm.Stats


class Stats(NamedTuple):
    wide_tall: ChainStats
    tall_wide: ChainStats


class ChainSaved(NamedTuple):
    first: conv_norm_relu.Saved
    conv: conv.Saved
    norm: batch_norm.Saved
    s: Shaped[Array, "N 1 H W"]


class Saved(NamedTuple):
    wide_tall: ChainSaved
    tall_wide: ChainSaved
    gate: Shaped[Array, "N 1 H W"]
    relu: bool


def init(rng, channels, kernel=9):
    """Each part as its own file starts it; a bias in every convolution."""
    hidden, wide, tall = max(channels // 2, 1), (1, kernel), (kernel, 1)

    def chain(first, second):
        return Chain(
            conv_norm_relu.init(rng, channels, hidden, first, bias=True),
            conv_norm_relu.init(rng, hidden, 1, second, bias=True),
        )

    return Params(chain(wide, tall), chain(tall, wide))


@shaped
def forward(
    x: Shaped[Array, "N C H W"],
    params: Params,
    *,
    relu: bool = True,
    stats: Stats | None = None,
    eps: float = 1e-3,
) -> tuple[Shaped[Array, "N C H W"], Saved]:
    for chain in Params._fields:
        for part in Chain._fields:
            shape = getattr(getattr(params, chain), part).conv.weight.shape
            what = f"pyramid_spatial.forward: params.{chain}.{part}.conv.weight.shape"
            expect(all(k % 2 for k in shape[2:]), what, shape, "a kernel with odd sides")
    stats = stats or Stats(ChainStats(None, None), ChainStats(None, None))
    one, wide_tall = _chain(x, params.wide_tall, relu, stats.wide_tall, eps)
    other, tall_wide = _chain(x, params.tall_wide, relu, stats.tall_wide, eps)
    gate = elementwise.sigmoid(one + other)
    return gate.repeat(x.shape[1], axis=1), Saved(wide_tall, tall_wide, gate, relu)


@shaped
def backward(dy: Shaped[Array, "N C H W"], saved: Saved) -> tuple[Shaped[Array, "N C H W"], Params]:
    dgate = dy.sum(axis=1, keepdims=True)
    ds = dgate * saved.gate * elementwise.sigmoid(-saved.wide_tall.s - saved.tall_wide.s)
    dx_one, dwide_tall = _chain_backward(ds, saved.wide_tall, saved.relu)
    dx_other, dtall_wide = _chain_backward(ds, saved.tall_wide, saved.relu)
    return dx_one + dx_other, Params(dwide_tall, dtall_wide)


def _chain(x, params, relu, stats, eps):
    h, first = conv_norm_relu.forward(x, params.first, padding=_same(params.first), stats=stats.first, eps=eps)
    a, convolved = conv.forward(h, params.second.conv, padding=_same(params.second))
    u, norm = batch_norm.forward(a, params.second.norm, stats=stats.second, eps=eps)
    s = elementwise.relu(u) if relu else u
    return s, ChainSaved(first, convolved, norm, s)


def _chain_backward(ds, saved, relu):
    du = ds * (saved.s.real > 0) if relu else ds
    da, dnorm = batch_norm.backward(du, saved.norm)
    dh, dconv = conv.backward(da, saved.conv)
    dx, dfirst = conv_norm_relu.backward(dh, saved.first)
    return dx, Chain(dfirst, conv_norm_relu.Params(dconv, dnorm))


def _same(params):
    """The padding that keeps the space."""
    return tuple(k // 2 for k in params.conv.weight.shape[2:])


def example(draw):
    """Small numbers and a large eps: nearly equal values, normalised twice, would have gradients of rounding alone."""
    channels, kernel = draw.size("C", high=4), draw.choice("k", 1, 3, 5)
    x = draw.array(draw.size("N", low=2, high=3), channels, draw.size("H", high=3), draw.size("W"))
    params = draw.like(init(draw.rng, channels, kernel))
    params = tree_map(lambda p: p / 4 + 0.25, params)
    options = {"relu": draw.choice("relu", True, False), "eps": draw.choice("eps", 0.01, 0.5)}
    if draw.choice("mode", "training", "inference") == "inference":
        options["stats"] = example_stats(draw, params)
    return Call((x, params), options)


def example_stats(draw, params):
    """Statistics for inference, as arbitrary as the params."""

    def stats(unit):
        return batch_norm.example_stats(draw, len(unit.norm.gamma))

    return Stats(*(ChainStats(*map(stats, chain)) for chain in params))


ABOUT = About(weights="gate", laws=("weights_in_unit_interval",), witnesses=("authors' code", "definition", "relation"))
