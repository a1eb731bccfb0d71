r"""Attention with linear biases (ALiBi).

A number that falls with the distance of query and key is added to their score: each head falls at its own slope.

Paper: Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
    ICLR 2022 (arXiv:2108.12409).

Shapes
    H heads, Q queries, K keys.

Forward, to be added to the scaled scores, query i standing at p_i = i + offset
    bias_hij = -slope_h |p_i - j|             form="distance"
    bias_hij = -slope_h (p_i - j)             form="relative"
    bias_hij =  slope_h j                     form="key_position"

Backward, with a bar for "gradient of the loss with respect to"
    slopebar_h = sum_ij biasbar_hij * (what slope_h is multiplied by)

Choices
    Softmax does not see what is the same for all keys of a query: under a causal mask the three forms give the same
    attention, with another log-sum-exp. Without one they differ. "distance" is MLX and what flash-attention
    documents, "relative" cuDNN, FlashInfer and the paper's figure, "key_position" the authors' code and Bloom; MPT
    has -slope (K - 1 - j), which is "relative" for the last query only, and the same under softmax.
    slopes(heads) are the published ones, a geometric sequence; learned ones are any others. With several items of
    different offsets, make a bias for each.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


def slopes(heads):
    """2^(-8 h / heads) for h = 1, 2, ..., heads, where heads is a power of 2.

    Else those of the power of 2 below it, and then every other one of those of the power of 2 above it.
    """
    expect(heads > 0, "alibi.slopes: heads", heads, "a positive int")
    below = 2 ** int(math.log2(heads))
    few, many = (2.0 ** (-8 * np.arange(1, n + 1) / n) for n in (below, 2 * below))
    return np.concatenate([few, many[::2][: heads - below]])


class Saved(NamedTuple):
    distance: Shaped[Array, "Q K"]  # what a slope is multiplied by


@shaped
def forward(
    slopes: Shaped[Array, "H"], *, queries: int, keys: int, offset: int = 0, form: str = "distance"
) -> tuple[Shaped[Array, "H Q K"], Saved]:
    sizes = queries, keys, offset
    whole = all(isinstance(size, (int, np.integer)) for size in sizes)
    expect(whole and min(queries, keys) >= 0, "alibi.forward: queries, keys, offset", sizes, "ints, sizes >= 0")
    p, j = np.arange(queries)[:, None] + offset, np.arange(keys)
    forms = {"distance": -np.abs(p - j), "relative": j - p, "key_position": j + 0 * p}
    expect(form in forms, "alibi.forward: form", form, f"one of {', '.join(forms)}")
    distance = forms[form].astype(slopes.real.dtype)
    return slopes[:, None, None] * distance, Saved(distance)


@shaped
def backward(dbias: Shaped[Array, "H Q K"], saved: Saved) -> tuple[Shaped[Array, "H"]]:
    return ((dbias * saved.distance).sum(axis=(1, 2)),)


def example(draw):
    options = {
        "queries": draw.size("Q"),
        "keys": draw.size("K"),
        "offset": draw.choice("offset", 0, 3, -1),
        "form": draw.choice("form", "distance", "relative", "key_position"),
    }
    return Call((draw.array(draw.size("H")),), options)


ABOUT = About(witnesses=("framework", "definition", "relation"))
