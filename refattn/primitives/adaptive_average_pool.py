r"""Adaptive average pooling, to a given size.

Shapes
    N items, C channels, *S space in, *T space out.

Forward, with s over the bin of t: from floor(t S / T) up to, not including, ceil((t + 1) S / T), axis by axis
    y_nct = 1/m_t sum_s x_ncs                 m_t pixels in the bin

Backward, with a bar for "gradient of the loss with respect to"
    xbar_ncs = sum over t whose bin holds s of ybar_nct / m_t

Choices
    size is T, one number for all axes or one per axis; size=1, the default, is global pooling. Bins are torch's: where
    T does not divide S, neighbours share a pixel, and where T is larger than S, pixels are repeated.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.windows import bins, per_axis


class Saved(NamedTuple):
    space: tuple


@shaped
def forward(x: Shaped[Array, "N C *S"], *, size: int | tuple = 1) -> tuple[Shaped[Array, "N C *T"], Saved]:
    space = x.shape[2:]
    size = per_axis("adaptive_average_pool.forward: size", size, len(space), 1)
    expect(all(space), "adaptive_average_pool.forward: x.shape", x.shape, "at least one pixel")
    y = np.empty_like(x, shape=(*x.shape[:2], *size))
    for t, s in bins(space, size):
        y[t] = x[s].mean(axis=tuple(range(2, x.ndim)))
    return y, Saved(space)


@shaped
def backward(dy: Shaped[Array, "N C *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"]]:
    dx = np.zeros_like(dy, shape=(*dy.shape[:2], *saved.space))
    for t, s in bins(saved.space, dy.shape[2:]):
        share = dy[t] / math.prod(dx[s].shape[2:])
        dx[s] += np.expand_dims(share, tuple(range(2, dy.ndim)))
    return (dx,)


def example(draw):
    space = tuple(draw.size(f"S{i}") for i in range(draw.choice("axes", 1, 2, 3)))
    size = draw.choice("size", 1, 3, tuple(draw.size(f"T{i}", high=5) for i in range(len(space))))
    return Call((draw.array(draw.size("N", high=2), draw.size("C", high=2), *space),), {"size": size})


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
