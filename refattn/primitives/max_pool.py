r"""Max pooling over sliding windows, in any number of dimensions.

Shapes
    N items, C channels, *S space in, *T space out.
    T = floor((S + 2 padding - dilation (kernel - 1) - 1) / stride) + 1, axis by axis.

Forward, with k over positions of the kernel
    k*_nct = argmax_k x_nc,stride t + dilation k - padding          x is -inf outside its space
    y_nct  = x_nc,stride t + dilation k* - padding

Backward, with a bar for "gradient of the loss with respect to"
    xbar_ncs = sum of ybar_nct over t with stride t + dilation k*_nct - padding = s

Choices
    Among equals the first in C order wins, and takes the whole gradient. NaN wins against every number.
    The stride is the kernel unless given. A window that does not fit is left out (torch's ceil_mode=False), and one
    that sees nothing but padding is an error.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped
from refattn.windows import Windows, inside, pad, padded_space, pixels_seen, taps, windows


class Saved(NamedTuple):
    source: Shaped[Ints, "N C *T"]  # where the maximum stands in the padded batch, counted in C order
    windows: Windows


@shaped
def forward(
    x: Shaped[Array, "N C *S"],
    *,
    kernel: int | tuple,
    stride: int | tuple | None = None,
    padding: int | tuple = 0,
    dilation: int | tuple = 1,
) -> tuple[Shaped[Array, "N C *T"], Saved]:
    stride = kernel if stride is None else stride
    w = windows("max_pool.forward", x.shape[2:], kernel, stride, padding, dilation)
    expect(pixels_seen(w).all(), "max_pool.forward: padding", padding, "less, so that every window sees a pixel of x")
    padded = pad(x, w, -np.inf)
    source = _source(_winner(padded.real, w), w)
    return padded.reshape(-1)[source], Saved(source, w)


@shaped
def backward(dy: Shaped[Array, "N C *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"]]:
    source, w = saved
    padded = np.zeros_like(dy, order="C", shape=(*dy.shape[:2], *padded_space(w)))
    np.add.at(padded.reshape(-1), source.ravel(), dy.ravel())
    return (padded[inside(w)],)


def _winner(padded, w):
    """k*, counted in C order: whoever is larger than all before it takes the place."""
    top = np.full((*padded.shape[:2], *w.output), -np.inf, padded.dtype)
    winner = np.zeros(top.shape, np.min_scalar_type(math.prod(w.kernel)))
    candidate, larger = np.empty_like(top), np.empty(top.shape, bool)
    for k, tap in enumerate(taps(w)):
        candidate[...] = padded[tap]
        np.greater(candidate, top, out=larger)
        larger |= np.isnan(candidate)
        np.maximum(top, candidate, out=top)
        np.maximum(winner, larger * winner.dtype.type(k), out=winner)
    return winner


def _source(winner, w):
    """Where the winner stands: where its image begins, plus where its window begins, plus where it is in the window."""
    image = np.arange(math.prod(padded_space(w))).reshape(padded_space(w))
    taps_from = [image[tap] for tap in taps(w)]
    images = image.size * np.arange(math.prod(winner.shape[:2])).reshape(*winner.shape[:2], *(1,) * image.ndim)
    return images + taps_from[0] + np.take([t.flat[0] for t in taps_from], winner)


def example(draw):
    axes = draw.choice("axes", 1, 2, 3)
    kernel = tuple(draw.size(f"K{i}", high=3) for i in range(axes))
    dilation = tuple(draw.size(f"dilation {i}", high=2) for i in range(axes))
    space = tuple(d * (k - 1) + draw.size(f"S{i}", high=3) for i, (k, d) in enumerate(zip(kernel, dilation)))
    options = {
        "kernel": kernel,
        "stride": draw.choice("stride", None, 1, 2),
        "padding": tuple(draw.size(f"padding {i}", low=0, high=k // 2) for i, k in enumerate(kernel)),
        "dilation": dilation,
    }
    return Call((draw.array(draw.size("N", high=2), draw.size("C", high=2), *space),), options)


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
