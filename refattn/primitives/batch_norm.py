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
        n = x.size // max(x.shape[1], 1)
        expect(n > 1, "batch_norm.forward: x.shape", x.shape, "more than one value per channel when training")
        stats = Stats(*by_channels(_moments, x))
    inverse_std = 1 / np.sqrt(stats.var + eps)
    scale = inverse_std if params is None else inverse_std * params.gamma
    shift = np.zeros_like(scale) if params is None else params.beta
    (y,) = by_channels(_normalise, x, stats.mean, scale, shift)
    return y, Saved(x, inverse_std, params, stats, training)


@shaped
def backward(dy: Shaped[Array, "N C *S"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params | None]:
    x, inverse_std, params, stats, training = saved
    scale = inverse_std if params is None else inverse_std * params.gamma
    pull_back = functools.partial(_pull_back, training)
    dx, dgamma, dbeta = by_channels(pull_back, dy, x, stats.mean, inverse_std, scale)
    return dx, None if params is None else Params(dgamma, dbeta)


def _moments(x):
    axes = _all_but_channels(x)
    mean = x.mean(axis=axes)
    centred = x - _channels(mean, x)
    return mean, (centred * centred).mean(axis=axes)


def _normalise(x, mean, scale, shift):
    return ((x - _channels(mean, x)) * _channels(scale, x) + _channels(shift, x),)


def _pull_back(training, dy, x, mean, inverse_std, scale):
    axes = _all_but_channels(dy)
    xhat = (x - _channels(mean, x)) * _channels(inverse_std, x)
    dgamma, dbeta = (dy * xhat).sum(axis=axes), dy.sum(axis=axes)
    dx = dy
    if training:
        n = math.prod(dy.shape[i] for i in axes)
        dx = dy - _channels(dbeta / n, dy) - xhat * _channels(dgamma / n, dy)
    return dx * _channels(scale, dy), dgamma, dbeta


def running(before, saved, *, momentum=0.1, unbiased=True):
    """Stats after one batch: (1 - momentum) before + momentum batch (torch's momentum; Keras' is 1 - momentum)."""
    n = saved.x.size // saved.x.shape[1]
    mean, var = saved.stats
    var = var * (n / (n - 1)) if unbiased else var
    return Stats((1 - momentum) * before.mean + momentum * mean, (1 - momentum) * before.var + momentum * var)


def _all_but_channels(x):
    return (0, *range(2, x.ndim))


def _channels(values, like):
    """(C,) against (N, C, *S)."""
    return values.reshape(-1, *(1,) * (like.ndim - 2))


def example(draw):
    channels, space = draw.size("C"), draw.choice("space", (), (draw.size("S"),), (draw.size("H"), draw.size("W")))
    x = draw.array(draw.size("N", low=2), channels, *space)
    params = draw.like(init(draw.rng, channels)) if draw.choice("affine", True, False) else None
    stats = draw.choice("mode", "training", "inference")
    if stats == "inference":
        mean, var = draw.like(init_stats(channels))
        return Call((x, params), {"stats": Stats(mean, var * var + 0.5)})
    return Call((x, params), {"eps": draw.choice("eps", 1e-5, 1e-3)})


ABOUT = About(witnesses=("framework", "definition"))
