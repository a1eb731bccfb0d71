r"""Average pooling over sliding windows, in any number of dimensions.

Shapes
    N items, C channels, *S space in, *T space out.
    T = floor((S + 2 padding - kernel) / stride) + 1, axis by axis.

Forward, with k over positions of the kernel
    y_nct = 1/m_t sum_k x_nc,stride t + k - padding                 x is 0 outside its space

Backward, with a bar for "gradient of the loss with respect to"
    xbar_ncs = sum over t, k with stride t + k - padding = s of ybar_nct / m_t

Choices
    m_t is the number of positions of the kernel, padding included; with count_include_pad=False it is the number
    of pixels that window t sees, as in Keras' padding="same". The stride is the kernel unless given.
    A window that does not fit is left out (torch's ceil_mode=False), and one that sees nothing but padding is an error.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from refattn.blocks import by_channels
from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.windows import Windows, inside, pad, padded_space, pixels_seen, taps_by_axis, windows


class Saved(NamedTuple):
    divisor: Shaped[Array, "*T"]
    windows: Windows


@shaped
def forward(
    x: Shaped[Array, "N C *S"],
    *,
    kernel: int | tuple,
    stride: int | tuple | None = None,
    padding: int | tuple = 0,
    count_include_pad: bool = True,
) -> tuple[Shaped[Array, "N C *T"], Saved]:
    w = windows("average_pool.forward", x.shape[2:], kernel, kernel if stride is None else stride, padding)
    seen = pixels_seen(w)
    expect(seen.all(), "average_pool.forward: padding", padding, "less, so that every window sees a pixel of x")
    divisor = np.where(count_include_pad, math.prod(w.kernel), seen).astype(x.real.dtype)

    y = np.empty_like(x, order="C", shape=(*x.shape[:2], *w.output))
    by_channels(functools.partial(_average, w, divisor), x, y)
    return y, Saved(divisor, w)


def _average(w, divisor, x, y):
    """Fill y."""
    total = pad(x, w)
    for taps in taps_by_axis(w):
        total = functools.reduce(np.add, (total[tap] for tap in taps))
    np.divide(total, divisor, out=y)


@shaped
def backward(dy: Shaped[Array, "N C *T"], saved: Saved) -> tuple[Shaped[Array, "N C *S"]]:
    divisor, w = saved
    padded = np.empty_like(dy, order="C", shape=(*dy.shape[:2], *padded_space(w)))
    by_channels(functools.partial(_pull_back, w, divisor), padded, dy)
    return (padded[inside(w)],)


def _pull_back(w, divisor, padded, dy):
    """Fill padded."""
    share = dy / divisor
    for axis, taps in reversed([*enumerate(taps_by_axis(w), 2)]):
        wider = np.zeros_like(share, shape=(*share.shape[:axis], padded.shape[axis], *share.shape[axis + 1 :]))
        for tap in taps:
            wider[tap] += share
        share = wider
    padded[:] = share


def example(draw):
    axes = draw.choice("axes", 1, 2, 3)
    kernel = tuple(draw.size(f"K{i}", high=3) for i in range(axes))
    space = tuple(k - 1 + draw.size(f"S{i}", high=3) for i, k in enumerate(kernel))
    options = {
        "kernel": kernel,
        "stride": draw.choice("stride", None, 1, 2),
        "padding": tuple(draw.size(f"padding {i}", low=0, high=k // 2) for i, k in enumerate(kernel)),
        "count_include_pad": draw.choice("count_include_pad", True, False),
    }
    return Call((draw.array(draw.size("N", high=2), draw.size("C", high=2), *space),), options)


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
