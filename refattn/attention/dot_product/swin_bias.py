r"""Relative position bias of a window (Swin).

A learned number per head is added to the score of two pixels of a window, looked up by how many rows and columns
lie between them.

Paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021
    (arXiv:2103.14030), section 3.2.

Shapes
    A window of M by W pixels, T = M W of them row by row; N = (2 M - 1)(2 W - 1) offsets, H heads.

Forward, to be added to the scaled scores of query (y, x) and key (v, u)
    bias_h,yx,vu = table_nh                   n = (y - v + M - 1)(2 W - 1) + (x - u + W - 1)    (eq. 4: B out of B^)

Backward, with a bar for "gradient of the loss with respect to"
    tablebar_nh = sum over the pairs of pixels with offset n of biasbar_h,yx,vu

Choices
    The order of the table is the authors': rows of the offset in y, the query minus the key, from -(M - 1) to M - 1.
    The gradient is for one window; the bias is shared by all windows of a batch, whose gradients are summed.
    In shifted windows the authors add a mask of 0 and -100 besides; -100 lets a little through.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped
from refattn.windows import per_axis


class Saved(NamedTuple):
    offset: Shaped[Ints, "T T"]  # which row of the table
    rows: int


@shaped
def forward(table: Shaped[Array, "N H"], *, window: int | tuple) -> tuple[Shaped[Array, "H T T"], Saved]:
    m, w = per_axis("swin_bias.forward: window", window, 2, 1)
    rows = (2 * m - 1) * (2 * w - 1)
    expect(len(table) == rows, "swin_bias.forward: table.shape", table.shape, f"{rows} rows, from window {(m, w)}")
    y, x = np.divmod(np.arange(m * w), w)
    offset = (y[:, None] - y + m - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)
    return np.moveaxis(table[offset], -1, 0), Saved(offset, rows)


@shaped
def backward(dbias: Shaped[Array, "H T T"], saved: Saved) -> tuple[Shaped[Array, "N H"]]:
    dtable = np.zeros_like(dbias, order="C", shape=(saved.rows, len(dbias)))
    np.add.at(dtable, saved.offset, np.moveaxis(dbias, 0, -1))
    return (dtable,)


def example(draw):
    m, w = draw.size("M", high=3), draw.size("W", high=3)
    window = m if m == w else (m, w)
    return Call((draw.array((2 * m - 1) * (2 * w - 1), draw.size("H", high=3)),), {"window": window})


ABOUT = About(witnesses=("framework", "definition"))
