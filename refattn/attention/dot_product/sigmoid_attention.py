r"""Sigmoid attention.

Every pair of query and key has a gate of its own: no key takes weight from another, and weights need not sum to 1.

Paper: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", ICLR 2025
(arXiv:2409.04431), section 2.

Shapes
    B items, *H heads (or nothing), Q queries, K keys, D features of a query or key, E features of a value.

Forward
    S = scale Q K^T + bias                    scale is 1 / sqrt(D), bias is -log K
    P = sigmoid(S)                            0 where a key takes no part
    Y = P V

Backward, with a bar for "gradient of the loss with respect to"
    Pbar = Ybar V^T,        Vbar = P^T Ybar
    Sbar = P (1 - P) Pbar
    Qbar = scale Sbar K,    Kbar = scale Sbar^T Q,    biasbar = the sum of Sbar

Choices
    bias is one number per head. Left out it is the paper's -log K, with which the weights of K average keys sum to
    about 1. K counts masked keys too: then masking a key is not the same as not having it. x-transformers has no bias,
    which is np.zeros(heads).
    mask and is_causal as in scaled_dot_product. A query that may attend to nothing gets zeros, and gives none a
    gradient. What is masked is multiplied by 0, so that NaN or inf in a masked value shows in y.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.elementwise import sigmoid


class Saved(NamedTuple):
    q: Shaped[Array, "B *H Q D"]
    k: Shaped[Array, "B *H K D"]
    v: Shaped[Array, "B *H K E"]
    bias: Shaped[Array, "*H"] | None
    attn: Shaped[Array, "B *H Q K"]
    scale: float


@shaped
def forward(
    q: Shaped[Array, "B *H Q D"],
    k: Shaped[Array, "B *H K D"],
    v: Shaped[Array, "B *H K E"],
    bias: Shaped[Array, "*H"] | None = None,
    *,
    scale: float | None = None,
    mask: Shaped[Bools, "B *H Q K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B *H Q E"], Saved]:
    expect(q.shape[-1] > 0, "sigmoid_attention.forward: q.shape", q.shape, "at least one feature")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    expect(math.isfinite(scale), "sigmoid_attention.forward: scale", scale, "a finite number, or None")
    scores = scale * (q @ k.swapaxes(-1, -2))
    scores = scores - math.log(max(k.shape[-2], 1)) if bias is None else scores + bias[..., None, None]
    allowed = np.ones(scores.shape, bool) if mask is None else mask
    if is_causal:
        allowed = allowed & np.tri(*scores.shape[-2:], dtype=bool)
    attn = np.where(allowed, sigmoid(np.where(allowed, scores, 0)), 0)
    return attn @ v, Saved(q, k, v, bias, attn, scale)


@shaped
def backward(
    dy: Shaped[Array, "B *H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B *H Q D"], Shaped[Array, "B *H K D"], Shaped[Array, "B *H K E"], Shaped[Array, "*H"] | None]:
    q, k, v, bias, attn, scale = saved
    dattn, dv = dy @ v.swapaxes(-1, -2), attn.swapaxes(-1, -2) @ dy
    dscores = attn * (1 - attn) * dattn
    dq, dk = scale * (dscores @ k), scale * (dscores.swapaxes(-1, -2) @ q)
    return dq, dk, dv, None if bias is None else dscores.sum(axis=(0, -2, -1))


def example(draw):
    heads = draw.choice("heads", (), (draw.size("H", high=2),))
    lead = draw.size("B", high=2), *heads
    queries, keys, features = draw.size("Q"), draw.size("K"), draw.size("D")
    q, k = draw.array(*lead, queries, features), draw.array(*lead, keys, features)
    v = draw.array(*lead, keys, draw.size("E"))
    options = {
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(*lead, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    return Call((q, k, v, draw.array(*heads) if draw.choice("bias", True, False) else None), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "key_permutation_invariant"),
    witnesses=("definition", "relation"),
)
