r"""Bilinear resizing of images, up or down.

Shapes
    N images, C channels, H by W pixels in, T by U pixels out.

Forward
    y_nctu = sum_hw A_th x_nchw B_uw          y = A x B', with one interpolation matrix per axis

    Output position t lies at h_t = t (H - 1) / (T - 1)           corners meet corners: align_corners=True
                           or h_t = (t + 1/2) H / T - 1/2         the image is stretched, align_corners=False
    and A_t has 1 - f at floor(h_t) and f at the pixel after it, f the fraction of h_t. Past the border, the border.

Backward, with a bar for "gradient of the loss with respect to"
    xbar_nchw = sum_tu A_th ybar_nctu B_uw    xbar = A' ybar B

Choices
    align_corners=False is what torch and current TensorFlow do unless told otherwise, True what older networks were
    trained with. One output position with align_corners=True lies at 0. Shrinking reads two pixels per axis and
    skips the others (antialias=False in torch).
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.windows import per_axis


class Saved(NamedTuple):
    a: Shaped[Array, "T H"]
    b: Shaped[Array, "U W"]


@shaped
def forward(
    x: Shaped[Array, "N C H W"], *, size: int | tuple, align_corners: bool = False
) -> tuple[Shaped[Array, "N C T U"], Saved]:
    size = per_axis("bilinear_resize.forward: size", size, 2, 1)
    expect(all(x.shape[2:]), "bilinear_resize.forward: x.shape", x.shape, "at least one pixel")
    a, b = (_matrix(s, t, align_corners).astype(x.real.dtype) for s, t in zip(x.shape[2:], size))
    return _along_rows(a @ x, b.T), Saved(a, b)


@shaped
def backward(dy: Shaped[Array, "N C T U"], saved: Saved) -> tuple[Shaped[Array, "N C H W"]]:
    a, b = saved
    return (a.T @ _along_rows(dy, b),)


def _along_rows(x, matrix):
    """x @ matrix as one product instead of N C small ones."""
    rows = x.reshape(math.prod(x.shape[:3]), x.shape[3])
    return (rows @ matrix).reshape(*x.shape[:3], matrix.shape[1])


def _matrix(inputs, outputs, align_corners):
    """Interpolation as a matrix (outputs, inputs). Positions are fractions of ints: exact until they are divided."""
    t = np.arange(outputs)
    if align_corners:
        numerator, denominator = t * (inputs - 1), max(outputs - 1, 1)
    else:
        numerator, denominator = np.maximum((2 * t + 1) * inputs - outputs, 0), 2 * outputs
    below, rest = np.divmod(numerator, denominator)
    fraction = rest / np.longdouble(denominator)
    matrix = np.zeros((outputs, inputs), np.longdouble)
    matrix[t, below] = 1 - fraction
    matrix[t, np.minimum(below + 1, inputs - 1)] += fraction
    return matrix


def example(draw):
    x = draw.array(draw.size("N", high=2), draw.size("C", high=2), draw.size("H"), draw.size("W"))
    size = draw.choice("size", 3, (draw.size("T", high=6), draw.size("U", high=6)))
    return Call((x,), {"size": size, "align_corners": draw.choice("align_corners", True, False)})


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition"))
