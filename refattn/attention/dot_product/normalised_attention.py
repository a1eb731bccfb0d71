r"""Dot-product attention with another normaliser than softmax.

As in scaled_dot_product every query takes a weighted sum of the values; how scores become weights is an option.

Paper: Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016 (arXiv:1602.02068), section 4.3, which tries
sparsemax in attention; the file of each normaliser names its own.

Shapes
    B items, *H heads (or nothing), Q queries, K keys, D features of a query or key, E features of a value.

Forward
    S = scale Q K^T                           scale is 1 / sqrt(D)
    P = normaliser(S)                         row by row, over the keys that the query may attend to
    Y = P V

Backward, with a bar for "gradient of the loss with respect to"
    Pbar = Ybar V^T,        Vbar = P^T Ybar
    Sbar = the backward of the normaliser
    Qbar = scale Sbar K,    Kbar = scale Sbar^T Q

Choices
    normaliser: "softmax", "softmax_plus_one", "sparsemax", "entmax" (all without options), "top_k_softmax"
    (options={"k": 8, "ties": "first"}), "gumbel_softmax" (options={"temperature": 0.5, "noise": of the shape of S}).
    A temperature for any of them is scale / temperature. Weights that are no normalisation: sigmoid_attention.
    mask and is_causal as in scaled_dot_product. A query that may attend to nothing gets zeros, and gives none a
    gradient. What is masked is multiplied by 0, so that NaN or inf in a masked value shows in y.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import entmax, gumbel_softmax, softmax, softmax_plus_one, sparsemax, top_k_softmax

NORMALISERS = {
    "softmax": softmax,
    "softmax_plus_one": softmax_plus_one,
    "sparsemax": sparsemax,
    "entmax": entmax,
    "top_k_softmax": top_k_softmax,
    "gumbel_softmax": gumbel_softmax,
}


class Saved(NamedTuple):
    q: Shaped[Array, "B *H Q D"]
    k: Shaped[Array, "B *H K D"]
    v: Shaped[Array, "B *H K E"]
    attn: Shaped[Array, "B *H Q K"]
    scale: float
    normaliser: str
    normalised: tuple  # the normaliser's own Saved


@shaped
def forward(
    q: Shaped[Array, "B *H Q D"],
    k: Shaped[Array, "B *H K D"],
    v: Shaped[Array, "B *H K E"],
    *,
    normaliser: str = "softmax",
    options: dict | None = None,
    scale: float | None = None,
    mask: Shaped[Bools, "B *H Q K"] | None = None,
    is_causal: bool = False,
) -> tuple[Shaped[Array, "B *H Q E"], Saved]:
    where = "normalised_attention.forward:"
    expect(normaliser in NORMALISERS, f"{where} normaliser", normaliser, f"one of {', '.join(NORMALISERS)}")
    good = options is None or (isinstance(options, dict) and not {"axis", "mask"} & set(options))
    expect(good, f"{where} options", options, "None, or a dict of options of the normaliser but axis and mask")
    expect(q.shape[-1] > 0, f"{where} q.shape", q.shape, "at least one feature")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    expect(math.isfinite(scale), f"{where} scale", scale, "a finite number, or None")
    scores = scale * (q @ k.swapaxes(-1, -2))
    allowed = np.ones(scores.shape, bool) if mask is None else mask
    if is_causal:
        allowed = allowed & np.tri(*scores.shape[-2:], dtype=bool)
    attn, normalised = NORMALISERS[normaliser].forward(scores, mask=allowed, **(options or {}))
    return attn @ v, Saved(q, k, v, attn, scale, normaliser, normalised)


@shaped
def backward(
    dy: Shaped[Array, "B *H Q E"], saved: Saved
) -> tuple[Shaped[Array, "B *H Q D"], Shaped[Array, "B *H K D"], Shaped[Array, "B *H K E"]]:
    q, k, v, attn, scale, normaliser, normalised = saved
    dattn, dv = dy @ v.swapaxes(-1, -2), attn.swapaxes(-1, -2) @ dy
    (dscores,) = NORMALISERS[normaliser].backward(dattn, normalised)
    return scale * (dscores @ k), scale * (dscores.swapaxes(-1, -2) @ q), dv


def example(draw):
    lead = draw.size("B", high=2), *draw.choice("heads", (), (draw.size("H", high=2),))
    queries, keys, features = draw.size("Q"), draw.size("K"), draw.size("D")
    q, k = draw.array(*lead, queries, features), draw.array(*lead, keys, features)
    v = draw.array(*lead, keys, draw.size("E"))
    normaliser = draw.choice("normaliser", *NORMALISERS)
    its_own = {
        "top_k_softmax": {"k": draw.size("k", high=3), "ties": draw.choice("ties", "first", "all")},
        "gumbel_softmax": {"temperature": draw.choice("temperature", 1.0, 0.5)},
    }
    options = {
        "normaliser": normaliser,
        "options": its_own.get(normaliser),
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(*lead, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    return Call((q, k, v), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "mask_is_truncation", "causal"),
    witnesses=("definition", "relation"),
)
