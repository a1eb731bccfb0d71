r"""Decomposed relative position attention (MViTv2, ViTDet, SAM).

Attention over the pixels of an image whose scores see, besides the key, the query's product with a learned vector
for the rows between the two and with another for the columns.

Paper: Li et al., "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection", CVPR 2022
    (arXiv:2112.01526); Kirillov et al., "Segment Anything", ICCV 2023 (arXiv:2304.02643).

Shapes
    B items, *H heads (or nothing), Q queries and K keys, row by row, of D features; values of E features.
    A table of L vectors for rows, and one of N for columns.

Forward, query (y, x) of h by w pixels and key (y', x') of m by n
    rows, columns = the tables, resized along their length to 2 max(h, m) - 1 and 2 max(w, n) - 1
    r = floor(y max(m / h, 1) - y' max(h / m, 1) + (m - 1) max(h / m, 1)),      c the same of x, w and n
    S = scale q . k + q . rows_r + q . columns_c      scale is 1 / sqrt(D)
    P = softmax(S)
    Y = P V

Backward, with a bar for "gradient of the loss with respect to"
    Pbar = Ybar V^T,        Vbar = P^T Ybar
    Sbar = P (Pbar - sum_j Pbar P)            softmax, row by row
    qbar = scale Sbar k + (sum over columns of Sbar) rows_r + (sum over rows of Sbar) columns_c
    kbar = scale Sbar^T q
    rowsbar_r = sum of (sum over columns of Sbar) q over all that look up r;    columnsbar_c likewise
    and these, through the backward of the resizing, are the gradients of the tables

Choices
    The code of all three scales the product with the key only; MViTv2's paper scales the whole: scale_bias=True.
    r is counted in whole numbers; the code does it in float32, which may end one lower, as with 8 queries and 6 keys,
    but not where one size divides the other. Tables of another length are stretched linearly, as in SAM (torch's
    interpolate with align_corners=False).
    prefix is how many tokens stand before the pixels, as a class token in MViTv2: rows and columns without a bias.
    MViTv2 adds q to y afterwards (residual pooling).
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped
from refattn.primitives import bilinear_resize, softmax
from refattn.windows import per_axis


class Params(NamedTuple):
    rows: Shaped[Array, "L D"]
    columns: Shaped[Array, "N D"]


class Saved(NamedTuple):
    q: Shaped[Array, "B *H Q D"]
    k: Shaped[Array, "B *H K D"]
    v: Shaped[Array, "B *H K E"]
    row: Shaped[Ints, "h m"]  # r, of rows
    column: Shaped[Ints, "w n"]  # c, of columns
    rows: Shaped[Array, "h m D"]
    columns: Shaped[Array, "w n D"]
    resized_rows: bilinear_resize.Saved
    resized_columns: bilinear_resize.Saved
    attn: Shaped[Array, "B *H Q K"]
    scale: float
    bias_scale: float
    prefix: int


def init(rng, features, size):
    """Zeros, as SAM; of the lengths that need no resizing for queries and keys of this size."""
    return Params(*(np.zeros((2 * length - 1, features)) for length in size))


@shaped
def forward(
    q: Shaped[Array, "B *H Q D"],
    k: Shaped[Array, "B *H K D"],
    v: Shaped[Array, "B *H K E"],
    params: Params,
    *,
    size: tuple,
    key_size: tuple | None = None,
    prefix: int = 0,
    scale: float | None = None,
    scale_bias: bool = False,
) -> tuple[Shaped[Array, "B *H Q E"], Saved]:
    where = "decomposed_2d.forward:"
    expect(q.shape[-1] > 0, f"{where} q.shape", q.shape, "at least one feature")
    expect(isinstance(prefix, (int, np.integer)) and prefix >= 0, f"{where} prefix", prefix, "an int of at least 0")
    h, w = per_axis(f"{where} size", size, 2, 1)
    m, n = per_axis(f"{where} key_size", size if key_size is None else key_size, 2, 1)
    expect(q.shape[-2] == prefix + h * w, f"{where} q.shape", q.shape, f"Q = {prefix + h * w}, from size and prefix")
    expect(k.shape[-2] == prefix + m * n, f"{where} k.shape", k.shape, f"K = {prefix + m * n}, from size and prefix")
    for name, table in zip(params._fields, params):
        expect(len(table) > 0, f"{where} params.{name}.shape", table.shape, "at least one row")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    expect(math.isfinite(scale), f"{where} scale", scale, "a finite number, or None")
    bias_scale = scale if scale_bias else 1.0
    row, rows, resized_rows = _look_up(params.rows, h, m)
    column, columns, resized_columns = _look_up(params.columns, w, n)
    pixels = q[..., prefix:, :].reshape(*q.shape[:-2], h, w, q.shape[-1])
    by_row = np.einsum("...hwd,hmd->...hwm", pixels, rows)
    by_column = np.einsum("...hwd,wnd->...hwn", pixels, columns)
    bias = by_row[..., :, None] + by_column[..., None, :]  # (..., h, w, m, n)
    scores = scale * (q @ k.swapaxes(-1, -2))
    scores[..., prefix:, prefix:] += bias_scale * bias.reshape(*q.shape[:-2], h * w, m * n)
    attn, _ = softmax.forward(scores)
    looked_up = row, column, rows, columns, resized_rows, resized_columns
    return attn @ v, Saved(q, k, v, *looked_up, attn, scale, bias_scale, prefix)


@shaped
def backward(
    dy: Shaped[Array, "B *H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B *H Q D"], Shaped[Array, "B *H K D"], Shaped[Array, "B *H K E"], Params]:
    q, k, v, row, column, rows, columns, resized_rows, resized_columns, attn, scale, bias_scale, prefix = saved
    (h, m), (w, n) = row.shape, column.shape
    dattn, dv = dy @ v.swapaxes(-1, -2), attn.swapaxes(-1, -2) @ dy
    (dscores,) = softmax.backward(dattn, softmax.Saved(attn, axis=-1))
    dbias = bias_scale * dscores[..., prefix:, prefix:].reshape(*q.shape[:-2], h, w, m, n)
    dby_row, dby_column = dbias.sum(axis=-1), dbias.sum(axis=-2)
    dpixels = np.einsum("...hwm,hmd->...hwd", dby_row, rows)
    dpixels = dpixels + np.einsum("...hwn,wnd->...hwd", dby_column, columns)
    dq = scale * (dscores @ k)
    dq[..., prefix:, :] += dpixels.reshape(*q.shape[:-2], h * w, q.shape[-1])
    pixels = q[..., prefix:, :].reshape(math.prod(q.shape[:-2]), h, w, q.shape[-1])
    dby_row, dby_column = (d.reshape(len(pixels), *d.shape[-3:]) for d in (dby_row, dby_column))
    drows = np.einsum("bhwm,bhwd->hmd", dby_row, pixels)
    dcolumns = np.einsum("bhwn,bhwd->wnd", dby_column, pixels)
    dparams = Params(_put_back(drows, row, resized_rows), _put_back(dcolumns, column, resized_columns))
    return dq, scale * (dscores.swapaxes(-1, -2) @ q), dv, dparams


def _look_up(table, queries, keys):
    """Along one axis of the image: index, vectors and what resizing saved, for positions of queries and of keys."""
    length = 2 * max(queries, keys) - 1
    resized, saved = bilinear_resize.forward(table.T[None, :, None], size=(1, length))  # an image one pixel high
    y, z = np.arange(queries)[:, None], np.arange(keys)
    if queries < keys:
        index = y * keys // queries - z + keys - 1
    else:
        index = y + (keys - 1 - z) * queries // keys
    return index, resized[0, :, 0].T[index], saved


def _put_back(dvectors, index, saved):
    """The gradient of the table from that of the vectors: the transpose of _look_up."""
    dresized = np.zeros_like(dvectors, order="C", shape=(2 * max(index.shape) - 1, dvectors.shape[-1]))
    np.add.at(dresized, index, dvectors)
    (dtable,) = bilinear_resize.backward(dresized.T[None, :, None], saved)
    return dtable[0, :, 0].T


def example(draw):
    lead = draw.size("B", high=2), *draw.choice("heads", (), (draw.size("H", high=2),))
    h, w, features, values = (draw.size(name, high=3) for name in ("h", "w", "D", "E"))
    m, n = draw.choice("key size", (h, w), (draw.size("m", high=3), draw.size("n", high=3)))
    prefix = draw.choice("prefix", 0, 1)
    lengths = [2 * max(a, b) - 1 + draw.choice("resized", 0, 2) for a, b in ((h, m), (w, n))]
    options = {
        "size": (h, w),
        "key_size": None if (m, n) == (h, w) else (m, n),
        "prefix": prefix,
        "scale": draw.choice("scale", None, 0.5),
        "scale_bias": draw.choice("scale_bias", False, True),
    }
    arrays = (prefix + h * w, features), (prefix + m * n, features), (prefix + m * n, values)
    params = Params(*(draw.array(length, features) for length in lengths))
    return Call((*(draw.array(*lead, *shape) for shape in arrays), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one"),
    witnesses=("framework", "definition"),
)
