r"""Scaled dot-product attention.

Every query takes a mean of the values, weighted by the softmax of its dot products with the keys.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.2.1.

Shapes
    B items, *H heads (or nothing), Q queries, K keys, D features of a query or key, E features of a value.

Forward
    S = scale Q K^T                           scores: scale is 1 / sqrt(D)       (eq. 1)
    P = softmax(S)                            row by row, over the keys that the query may attend to
    Y = P V

Backward, with a bar for "gradient of the loss with respect to"
    Pbar = Ybar V^T,        Vbar = P^T Ybar   Y is linear in P and in V
    Sbar = P (Pbar - sum_j Pbar P)            softmax, row by row
    Qbar = scale Sbar K,    Kbar = scale Sbar^T Q

Choices
    mask[..., i, j] is True where key j takes part for query i. It has one entry per score: a mask for all heads is
    np.broadcast_to(mask, (B, H, Q, K)). is_causal lets query i see the keys j <= i, counted from the first of
    each (top-left, as torch), and only those of them that the mask allows.
    A query that may attend to nothing gets zeros, and gives none a gradient. What is masked is multiplied by 0, so that
    NaN or inf in a masked value shows in y, and in a masked key in the gradient of q.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import softmax


class Saved(NamedTuple):
    q: Shaped[Array, "B *H Q D"]
    k: Shaped[Array, "B *H K D"]
    v: Shaped[Array, "B *H K E"]
    attn: Shaped[Array, "B *H Q K"]
    scale: float


@shaped
def forward(
    q: Shaped[Array, "B *H Q D"],
    k: Shaped[Array, "B *H K D"],
    v: Shaped[Array, "B *H K E"],
    *,
    scale: float | None = None,
    mask: Shaped[Bools, "B *H Q K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B *H Q E"], Saved]:
    expect(q.shape[-1] > 0, "scaled_dot_product.forward: q.shape", q.shape, "at least one feature")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    expect(math.isfinite(scale), "scaled_dot_product.forward: scale", scale, "a finite number, or None")
    scores = scale * (q @ k.swapaxes(-1, -2))
    allowed = np.ones(scores.shape, bool) if mask is None else mask
    if is_causal:
        allowed = allowed & np.tri(*scores.shape[-2:], dtype=bool)
    attn, _ = softmax.forward(scores, mask=allowed)
    return attn @ v, Saved(q, k, v, attn, scale)


@shaped
def backward(
    dy: Shaped[Array, "B *H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B *H Q D"], Shaped[Array, "B *H K D"], Shaped[Array, "B *H K E"]]:
    q, k, v, attn, scale = saved
    dattn, dv = dy @ v.swapaxes(-1, -2), attn.swapaxes(-1, -2) @ dy
    (dscores,) = softmax.backward(dattn, softmax.Saved(attn, axis=-1))
    return scale * (dscores @ k), scale * (dscores.swapaxes(-1, -2) @ q), dv


def example(draw):
    lead = draw.size("B", high=2), *draw.choice("heads", (), (draw.size("H", high=2),))
    queries, keys, features = draw.size("Q"), draw.size("K"), draw.size("D")
    q, k = draw.array(*lead, queries, features), draw.array(*lead, keys, features)
    v = draw.array(*lead, keys, draw.size("E"))
    options = {
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(*lead, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    return Call((q, k, v), options)


ABOUT = About(
    weights="attn",
    laws=(
        "batch_independent",
        "weights_in_unit_interval",
        "weights_sum_to_one",
        "key_permutation_invariant",
        "mask_is_truncation",
        "causal",
    ),
    witnesses=("framework", "definition", "relation"),
)
