r"""Embedding: rows of a table, looked up by id.

Shapes
    V rows in the table, D features, *S any shape of ids.

Forward
    y_sd = E_id,d                             id = ids_s

Backward, with a bar for "gradient of the loss with respect to"
    Ebar_vd = sum over s with ids_s = v of ybar_sd

Choices
    Ids run from 0 to V - 1; any other is an error: none counts from the end, none is clipped.
    The row padding_idx is looked up like any other, but its gradient is called 0, as in torch.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


class Saved(NamedTuple):
    ids: Shaped[Ints, "*S"]
    padding_idx: int | None
    rows: int


@shaped
def forward(
    table: Shaped[Array, "V D"], *, ids: Shaped[Ints, "*S"], padding_idx: int | None = None
) -> tuple[Shaped[Array, "*S D"], Saved]:
    rows = len(table)
    outside = ids[(ids < 0) | (ids >= rows)]
    expect(outside.size == 0, "embedding.forward: ids", outside[:1].tolist(), f"ids from 0 to {rows - 1}, from table")
    expect(
        padding_idx is None or 0 <= padding_idx < rows,
        *("embedding.forward: padding_idx", padding_idx, f"None or an id from 0 to {rows - 1}, from table"),
    )
    return table[ids], Saved(ids, padding_idx, rows)


@shaped
def backward(dy: Shaped[Array, "*S D"], saved: Saved) -> tuple[Shaped[Array, "V D"]]:
    dtable = np.zeros_like(dy, order="C", shape=(saved.rows, dy.shape[-1]))
    np.add.at(dtable, saved.ids, dy)
    if saved.padding_idx is not None:
        dtable[saved.padding_idx] = 0
    return (dtable,)


def example(draw):
    rows = draw.size("V", low=2)
    shape = tuple(draw.size(f"S{i}") for i in range(draw.choice("axes of ids", 1, 2, 0)))
    ids = draw.integers(0, rows - 2, *shape)  # the last row is left out: the gradient of padding is no derivative
    options = {"ids": ids, "padding_idx": draw.choice("padding_idx", None, rows - 1)}
    return Call((draw.array(rows, draw.size("D")),), options)


ABOUT = About(witnesses=("framework", "definition"))
