r"""Adaptive max pooling, to a given size.

Shapes
    N items, C channels, *S space in, *T space out.

Forward, with s over the bin of t: from floor(t S / T) up to, not including, ceil((t + 1) S / T), axis by axis
    s*_nct = argmax_s x_ncs
    y_nct  = x_nc,s*

Backward, with a bar for "gradient of the loss with respect to"
    xbar_ncs = sum over t with s*_nct = s of ybar_nct

Choices
    size is T, one number for all axes or one per axis; size=1, the default, is global pooling. Bins are torch's: where
    T does not divide S, neighbours share a pixel, and where T is larger than S, pixels are repeated.
    Among equals the first in C order wins, and takes the whole gradient. NaN wins against every number.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped
from refattn.windows import bins, per_axis


class Saved(NamedTuple):
    winner: Shaped[Ints, "N C *T"]  # s*, counted in C order
    space: tuple


@shaped
def forward(x: Shaped[Array, "N C *S"], *, size: int | tuple = 1) -> tuple[Shaped[Array, "N C *T"], Saved]:
    (n, c), space = x.shape[:2], x.shape[2:]
    size = per_axis("adaptive_max_pool.forward: size", size, len(space), 1)
    expect(all(space), "adaptive_max_pool.forward: x.shape", x.shape, "at least one pixel")
    pixel = np.arange(math.prod(space)).reshape(space)
    winner = np.empty((n, c, *size), int)
    for t, s in bins(space, size):
        candidates = pixel[s].ravel()
        winner[t] = candidates[x[s].reshape(n, c, len(candidates)).real.argmax(axis=2)]
    y = np.take_along_axis(x.reshape(n, c, pixel.size), winner.reshape(n, c, math.prod(size)), axis=2)
    return y.reshape(winner.shape), Saved(winner, space)


@shaped
def backward(dy: Shaped[Array, "N C *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"]]:
    (n, c), size = dy.shape[:2], math.prod(dy.shape[2:])
    dx = np.zeros_like(dy, order="C", shape=(n, c, math.prod(saved.space)))
    where = np.arange(n)[:, None, None], np.arange(c)[:, None], saved.winner.reshape(n, c, size)
    np.add.at(dx, where, dy.reshape(n, c, size))
    return (dx.reshape(n, c, *saved.space),)


def example(draw):
    space = tuple(draw.size(f"S{i}") for i in range(draw.choice("axes", 1, 2, 3)))
    size = draw.choice("size", 1, 3, tuple(draw.size(f"T{i}", high=5) for i in range(len(space))))
    return Call((draw.array(draw.size("N", high=2), draw.size("C", high=2), *space),), {"size": size})


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
