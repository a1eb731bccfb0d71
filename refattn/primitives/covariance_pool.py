r"""Covariance pooling: how the channels of an image vary together.

Paper: Li, Xie, Wang and Zuo, "Is Second-order Information Helpful for Large-scale Visual Recognition?", ICCV 2017
(arXiv:1703.08050).

Shapes
    N items, C channels, *S any number of spatial axes; M the number of pixels.

Forward, for one item
    d_cm  = x_cm - 1/M sum_m x_cm             centred: every channel has mean 0 over space
    s_cc' = 1/M sum_m d_cm d_c'm              symmetric, positive semidefinite

Backward, with a bar for "gradient of the loss with respect to"
    xbar = (sbar + sbar^T) d / M              d enters twice; its rows sum to 0, so nothing flows through the mean

Choices
    The sum is divided by M, as in the authors' code, not by M - 1. The gradient sbar need not be symmetric.
    The authors multiply x by I / M - 1 1^T / M^2 and that by x^T, which cancels badly where a channel's mean is large
    against its variation. Centring first is the same in exact arithmetic, and accurate.
"""

import math
from typing import NamedTuple

from refattn.core import About, Array, Call, Shaped, expect, shaped


class Saved(NamedTuple):
    d: Shaped[Array, "N C M"]
    shape: tuple  # of x


@shaped
def forward(x: Shaped[Array, "N C *S"]) -> tuple[Shaped[Array, "N C C"], Saved]:
    pixels = math.prod(x.shape[2:])
    expect(pixels > 0, "covariance_pool.forward: x.shape", x.shape, "at least one pixel")
    flat = x.reshape(*x.shape[:2], pixels)
    d = flat - flat.mean(axis=2, keepdims=True)
    return d @ d.swapaxes(1, 2) / pixels, Saved(d, x.shape)


@shaped
def backward(ds: Shaped[Array, "N C C"], saved: Saved) -> tuple[Shaped[Array, "N C *S"]]:
    d, shape = saved
    dx = (ds + ds.swapaxes(1, 2)) / d.shape[2] @ d
    return (dx.reshape(shape),)


def example(draw):
    space = draw.choice("space", (draw.size("S"),), (draw.size("H"), draw.size("W")))
    return Call((draw.array(draw.size("N"), draw.size("C"), *space),), {})


ABOUT = About(laws=("batch_independent",), witnesses=("authors' code", "definition"))
