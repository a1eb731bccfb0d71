r"""Group normalisation.

Shift and scale every group of channels of every item to mean 0 and variance 1, then each channel to gamma and beta.

Paper: Wu and He, "Group Normalization", ECCV 2018 (arXiv:1803.08494), section 3.1.

Shapes
    N items, C channels in groups of C / groups neighbours, *S any number of spatial axes.

Forward
    xhat    = layer_norm of each group, over its channels and *S together
    y_ncs   = gamma_c xhat_ncs + beta_c

Backward, with a bar for "gradient of the loss with respect to"
    gammabar_c = sum_ns ybar_ncs xhat_ncs,    betabar_c = sum_ns ybar_ncs
    xbar       = layer_norm's gradient of gamma_c ybar_ncs, group by group

Choices
    groups=C is instance normalisation. groups=1 has layer normalisation's statistics over C and *S, but one gamma and
    beta per channel. params=None leaves them out. eps and the variance are as in layer_norm.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import layer_norm


class Params(NamedTuple):
    gamma: Shaped[Array, "C"]
    beta: Shaped[Array, "C"]


class Saved(NamedTuple):
    xhat: Shaped[Array, "N C *S"]
    normalised: layer_norm.Saved
    params: Params | None
    groups: int


def init(rng, channels):
    """gamma = 1, beta = 0."""
    return Params(np.ones(channels), np.zeros(channels))


@shaped
def forward(
    x: Shaped[Array, "N C *S"], params: Params | None = None, *, groups: int, eps: float = 1e-5
) -> tuple[Shaped[Array, "N C *S"], Saved]:
    divides = isinstance(groups, (int, np.integer)) and groups > 0 and x.shape[1] % groups == 0
    expect(divides, "group_norm.forward: groups", groups, f"a divisor of C = {x.shape[1]}, from x")
    xhat, normalised = layer_norm.forward(_grouped(x, groups), eps=eps)
    xhat = xhat.reshape(x.shape)
    y = xhat if params is None else xhat * _channels(params.gamma, x) + _channels(params.beta, x)
    return y, Saved(xhat, normalised, params, groups)


@shaped
def backward(dy: Shaped[Array, "N C *S"], saved: Saved) -> tuple[Shaped[Array, "N C *S"], Params | None]:
    xhat, normalised, params, groups = saved
    dxhat, dparams = dy, None
    if params is not None:
        axes = (0, *range(2, dy.ndim))
        dxhat, dparams = dy * _channels(params.gamma, dy), Params((dy * xhat).sum(axis=axes), dy.sum(axis=axes))
    dx, _ = layer_norm.backward(_grouped(dxhat, groups), normalised)
    return dx.reshape(dy.shape), dparams


def _grouped(x, groups):
    """(N, C, *S) to (N, groups, everything in a group)."""
    n, channels, *space = x.shape
    return x.reshape(n, groups, channels // groups * math.prod(space))


def _channels(values, like):
    """(C,) against (N, C, *S)."""
    return values.reshape(-1, *(1,) * (like.ndim - 2))


def example(draw):
    """eps is large: with a small one, two numbers become 1 and -1, whose gradient is all rounding."""
    groups = draw.choice("groups", 1, 2, 3)
    channels = groups * draw.size("C / groups", high=3)
    space = draw.choice("space", (), (draw.size("S"),), (draw.size("H", high=3), draw.size("W", high=3)))
    params = draw.like(init(draw.rng, channels)) if draw.choice("affine", True, False) else None
    x = draw.array(draw.size("N", high=2), channels, *space)
    return Call((x, params), {"groups": groups, "eps": draw.choice("eps", 0.01, 0.5)})


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition", "relation"))
