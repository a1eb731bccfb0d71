r"""Relative position representations (Shaw).

Scaled dot-product attention in which every key and every value is seen with a learned vector added, that of its
distance to the query.

Paper: Shaw et al., "Self-Attention with Relative Position Representations", NAACL 2018 (arXiv:1803.02155).

Shapes
    B items, *H heads (or nothing), Q queries, K keys, D features of a query or key, E features of a value;
    tables of N = 2 c + 1 distances, from -c to c.

Forward, with r = clip(j - (i + offset), -c, c), how far key j stands after query i
    S_ij = scale q_i . (k_j + keys_r)         scale is 1 / sqrt(D)                (eq. 4)
    P = softmax(S)                            row by row, over the keys that the query may attend to
    y_i = sum_j P_ij (v_j + values_r)                                             (eq. 3)

Backward, with a bar for "gradient of the loss with respect to"
    Pbar_ij = ybar_i . (v_j + values_r)
    vbar_j  = sum_i P_ij ybar_i,              valuesbar_r = sum over i, j at distance r of P_ij ybar_i
    Sbar = P (Pbar - sum_j Pbar P)            softmax, row by row
    qbar_i  = scale sum_j Sbar_ij (k_j + keys_r)
    kbar_j  = scale sum_i Sbar_ij q_i,        keysbar_r = scale sum over i, j at distance r of Sbar_ij q_i

Choices
    The tables are shared by items and heads, as in the paper; for tables of each head, call it once per head.
    Later models have keys only: values=None. In causal models the rows after the middle are never looked up.
    offset is how many keys stand before the first query, as in decoding with a cache (K - Q in the authors' code);
    is_causal lets query i see the keys j <= i + offset. Masks are as in scaled_dot_product.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Ints, Shaped, expect, shaped
from refattn.primitives import softmax


class Params(NamedTuple):
    keys: Shaped[Array, "N D"]
    values: Shaped[Array, "N E"] | None = None


class Saved(NamedTuple):
    q: Shaped[Array, "B *H Q D"]
    k: Shaped[Array, "B *H K D"]
    v: Shaped[Array, "B *H K E"]
    params: Params
    row: Shaped[Ints, "Q K"]  # of the tables
    attn: Shaped[Array, "B *H Q K"]
    scale: float


def init(rng, features, clip=16, *, values=True):
    """Uniform within +-sqrt(6 / (2 clip + 1 + features)), as Glorot."""
    size = 2 * clip + 1, features
    limit = math.sqrt(6 / sum(size))
    return Params(rng.uniform(-limit, limit, size), rng.uniform(-limit, limit, size) if values else None)


@shaped
def forward(
    q: Shaped[Array, "B *H Q D"],
    k: Shaped[Array, "B *H K D"],
    v: Shaped[Array, "B *H K E"],
    params: Params,
    *,
    scale: float | None = None,
    mask: Shaped[Bools, "B *H Q K"] | None = None,
    is_causal: bool = False,
    offset: int = 0,
) -> tuple[Shaped[Array, "B *H Q E"], Saved]:
    rows = len(params.keys)
    expect(q.shape[-1] > 0, "shaw.forward: q.shape", q.shape, "at least one feature")
    expect(rows % 2 == 1, "shaw.forward: params.keys.shape", params.keys.shape, "an odd number of rows, 2 c + 1")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    expect(math.isfinite(scale), "shaw.forward: scale", scale, "a finite number, or None")
    expect(isinstance(offset, (int, np.integer)), "shaw.forward: offset", offset, "an int")
    after = np.arange(k.shape[-2]) - (np.arange(q.shape[-2])[:, None] + offset)
    row = np.clip(after, -(rows // 2), rows // 2) + rows // 2
    scores = scale * (q @ k.swapaxes(-1, -2) + np.einsum("...id,ijd->...ij", q, params.keys[row]))
    allowed = np.ones(scores.shape, bool) if mask is None else mask
    if is_causal:
        allowed = allowed & (after <= 0)
    attn, _ = softmax.forward(scores, mask=allowed)
    y = attn @ v
    if params.values is not None:
        y = y + np.einsum("...ij,ije->...ie", attn, params.values[row])
    return y, Saved(q, k, v, params, row, attn, scale)


@shaped
def backward(
    dy: Shaped[Array, "B *H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B *H Q D"], Shaped[Array, "B *H K D"], Shaped[Array, "B *H K E"], Params]:
    q, k, v, params, row, attn, scale = saved
    dattn, dv, dvalues = dy @ v.swapaxes(-1, -2), attn.swapaxes(-1, -2) @ dy, None
    if params.values is not None:
        dattn = dattn + np.einsum("...ie,ije->...ij", dy, params.values[row])
        dvalues = _per_row(attn, dy, row, len(params.keys))
    (dscores,) = softmax.backward(dattn, softmax.Saved(attn, axis=-1))
    dscores = scale * dscores
    dq = dscores @ k + np.einsum("...ij,ijd->...id", dscores, params.keys[row])
    dkeys = _per_row(dscores, q, row, len(params.keys))
    return dq, dscores.swapaxes(-1, -2) @ q, dv, Params(dkeys, dvalues)


def _per_row(weight, x, row, rows):
    """For every row of the table, the sum of weight_ij x_i over the pairs i, j that look it up, items and heads."""
    lead = math.prod(x.shape[:-2])
    pairs = np.einsum("nij,nid->ijd", weight.reshape(lead, *row.shape), x.reshape(lead, *x.shape[-2:]))
    table = np.zeros_like(pairs, order="C", shape=(rows, x.shape[-1]))
    np.add.at(table, row, pairs)
    return table


def example(draw):
    lead = draw.size("B", high=2), *draw.choice("heads", (), (draw.size("H", high=2),))
    queries, keys, features, values = (draw.size(name, high=high) for name, high in zip("QKDE", (4, 6, 3, 3)))
    rows = 2 * draw.size("c", low=0, high=2) + 1
    with_values = draw.choice("table of values", True, False)
    params = Params(draw.array(rows, features), draw.array(rows, values) if with_values else None)
    options = {
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(*lead, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "offset": draw.choice("offset", 0, 2, -1),
    }
    arrays = (*lead, queries, features), (*lead, keys, features), (*lead, keys, values)
    return Call((*(draw.array(*shape) for shape in arrays), params), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "mask_is_truncation"),
    witnesses=("definition", "relation"),
)
