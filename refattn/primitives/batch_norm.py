r"""Batch normalisation.

Shift and scale every channel to mean 0 and variance 1 over batch and space, then to what gamma and beta say.

Paper: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", ICML 2015 (arXiv:1502.03167), algorithm 1.

Shapes
    N items, C channels, *S any number of spatial axes (none for vectors); n = N times the number of pixels.

Forward
    mu_c = 1/n sum x_c,   v_c = 1/n sum (x_c - mu_c)^2          training: over batch and space
    xhat_c = (x_c - mu_c) / sqrt(v_c + eps)
    y_c    = gamma_c xhat_c + beta_c

Backward, with a bar for "gradient of the loss with respect to" and mean() over batch and space
    gammabar_c = sum ybar_c xhat_c,   betabar_c = sum ybar_c
    xbar_c = gamma_c / sqrt(v_c + eps) (ybar_c - mean(ybar_c) - xhat_c mean(ybar_c xhat_c))        training
    xbar_c = gamma_c / sqrt(v_c + eps) ybar_c                                                      inference

Choices
    stats=None is training: mu and v are the batch's own. Given stats are those of inference, and constants.
    The variance divides by n. The statistics come back in Saved.stats; `running` makes the moving average of them,
    for which torch takes the variance that divides by n - 1 (unbiased=True) and Keras the one here.
    Training needs n > 1, as in torch: one value per channel has no variance. params=None leaves out gamma and beta.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from refattn.blocks import by_channels
from refattn.core import About, Array, Call, Shaped, expect, shaped


class Params(NamedTuple):
    gamma: Shaped[Array, "C"]
    beta: Shaped[Array, "C"]


class Stats(NamedTuple):
    mean: Shaped[Array, "C"]
    var: Shaped[Array, "C"]


class Saved(NamedTuple):
    x: Shaped[Array, "N C *S"]
    inverse_std: Shaped[Array, "C"]
    params: Params | None
    stats: Stats  # the batch's own when training, the given ones otherwise
    training: bool


def init(rng, channels):
    """gamma = 1, beta = 0."""
    return Params(np.ones(channels), np.zeros(channels))


def init_stats(channels):
    """The running statistics before the first batch: mean 0, variance 1."""
    return Stats(np.zeros(channels), np.ones(channels))


@shaped
def forward(
    x: Shaped[Array, "N C *S"], params: Params | None = None, *, stats: Stats | None = None, eps: float = 1e-5
) -> tuple[Shaped[Array, "N C *S"], Saved]:
    expect(eps >= 0, "batch_norm.forward: eps", eps, "a number that is not negative")
    training = stats is None
    if training:
        expect(_count(x) > 1, "batch_norm.forward: x.shape", x.shape, "more than one value per channel when training")
    y = np.empty_like(x, np.result_type(x, *(params or ()), *(stats or ())), "C")
    stats, inverse_std = by_channels(functools.partial(_normalise, eps), x, params, stats, y)
    return y, Saved(x, inverse_std, params, stats, training)


def _normalise(eps, x, params, stats, y):
    """Fill y, in place: a pass over a large array costs less than the making of another one."""
    mean = x.mean(axis=_all_but_channels(x)) if stats is None else stats.mean
    np.subtract(x, _channels(mean, x), out=y)
    var = _sum_of_products(y, y) / _count(x) if stats is None else stats.var
    inverse_std = 1 / np.sqrt(var + eps)
    y *= _channels(inverse_std if params is None else params.gamma * inverse_std, y)
    if params is not None:
        y += _channels(params.beta, y)
    return Stats(mean, var), inverse_std


@shaped
def backward(dy: Shaped[Array, "N C *S"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params | None]:
    x, inverse_std, params, stats, training = saved
    dx = np.empty_like(dy, np.result_type(dy, x, inverse_std, *(params or ())), "C")
    dparams = by_channels(functools.partial(_pull_back, training), dy, x, inverse_std, params, stats, dx)
    return dx, None if params is None else dparams


def _pull_back(training, dy, x, inverse_std, params, stats, dx):
    """Fill dx, in place; xhat is x - mu times inverse_std."""
    np.subtract(x, _channels(stats.mean, x), out=dx)
    dgamma = _sum_of_products(dy, dx) * inverse_std
    dbeta = dy.sum(axis=_all_but_channels(dy))
    if training:
        dx *= _channels(-inverse_std * dgamma / _count(x), dx)
        dx += dy
        dx -= _channels(dbeta / _count(x), dx)
    else:
        dx[...] = dy
    dx *= _channels(inverse_std if params is None else params.gamma * inverse_std, dx)
    return Params(dgamma, dbeta)


def running(before, saved, *, momentum=0.1, unbiased=True):
    """Stats after one batch: (1 - momentum) before + momentum batch (torch's momentum; Keras' is 1 - momentum)."""
    n = _count(saved.x)
    mean, var = saved.stats
    var = var * (n / (n - 1)) if unbiased else var
    return Stats((1 - momentum) * before.mean + momentum * mean, (1 - momentum) * before.var + momentum * var)


def _all_but_channels(x):
    return (0, *range(2, x.ndim))


def _count(x):
    """n: how many values a channel has."""
    return math.prod(x.shape[i] for i in _all_but_channels(x))


def _sum_of_products(a, b):
    """sum a b of every channel: a row times a column, so that no product is stored."""
    n, c, pixels = *a.shape[:2], math.prod(a.shape[2:])
    return (a.reshape(n, c, 1, pixels) @ b.reshape(n, c, pixels, 1)).sum(axis=(0, 2, 3))


def _channels(values, like):
    """(C,) against (N, C, *S)."""
    return values.reshape(-1, *(1,) * (like.ndim - 2))


def example(draw):
    channels, space = draw.size("C"), draw.choice("space", (), (draw.size("S"),), (draw.size("H"), draw.size("W")))
    x = draw.array(draw.size("N", low=2), channels, *space)
    params = draw.like(init(draw.rng, channels)) if draw.choice("affine", True, False) else None
    stats = draw.choice("mode", "training", "inference")
    if stats == "inference":
        return Call((x, params), {"stats": example_stats(draw, channels)})
    return Call((x, params), {"eps": draw.choice("eps", 1e-5, 1e-3)})


def example_stats(draw, channels):
    """Statistics for inference: any means, positive variances."""
    mean, var = draw.like(init_stats(channels))
    return Stats(mean, var * var + 0.5)


ABOUT = About(witnesses=("framework", "definition"))
