r"""Sinusoidal position encoding.

Waves of the position, from short ones to long ones, are added to the embedding of a token.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), sections 3.4 and 3.5.

Shapes
    B items, T tokens of D features (an even number).

Forward, for a token at position p
    y_d = scale x_d + wave_d(p)
    wave_2i(p)   = sin(p theta_i)             theta_i = base^(-2i / D)
    wave_2i+1(p) = cos(p theta_i)

Backward, with a bar for "gradient of the loss with respect to"
    xbar_d = scale ybar_d

Choices
    layout="interleaved" is the paper's; with "concatenated" all sines come first and then all cosines, as in
    tensor2tensor, fairseq and Transformer-XL. The first two take base^(-i / (D / 2 - 1)) besides, with which the
    slowest wave is the base exactly: frequencies="inclusive".
    scale is what the paper multiplies embeddings with, sqrt(D); here 1.0 unless given.
    positions are 0, 1, 2, ... for every item unless given: fairseq starts after its padding_idx.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import rotary
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


def waves(positions, features, *, base=10000.0, layout="interleaved", frequencies="exclusive"):
    """The encoding of positions (...), of any integers: (..., features), in float64."""
    theta = rotary.frequencies(features, base)
    if frequencies == "inclusive":
        theta = base ** (-np.arange(len(theta)) / max(len(theta) - 1, 1))
    cos, sin = rotary.tables(positions, theta)
    if layout == "concatenated":
        return np.concatenate([sin, cos], axis=-1)
    return np.stack([sin, cos], axis=-1).reshape(*positions.shape, features)


class Saved(NamedTuple):
    scale: float


@shaped
def forward(
    x: Shaped[Array, "B T D"],
    *,
    positions: Shaped[Ints, "B T"] | None = None,
    scale: float = 1.0,
    base: float = 10000.0,
    layout: str = "interleaved",
    frequencies: str = "exclusive",
) -> tuple[Shaped[Array, "B T D"], Saved]:
    where, features = "sinusoidal.forward:", x.shape[-1]
    expect(features > 0 and features % 2 == 0, f"{where} x.shape", x.shape, "a positive even number of features")
    expect(math.isfinite(scale), f"{where} scale", scale, "a finite number")
    expect(base > 0, f"{where} base", base, "more than 0")
    expect(layout in LAYOUTS, f"{where} layout", layout, f"one of {', '.join(LAYOUTS)}")
    expect(frequencies in FREQUENCIES, f"{where} frequencies", frequencies, f"one of {', '.join(FREQUENCIES)}")
    if positions is None:
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    wave = waves(positions, features, base=base, layout=layout, frequencies=frequencies)
    return scale * x + wave.astype(x.real.dtype), Saved(scale)


@shaped
def backward(dy: Shaped[Array, "B T D"], saved: Saved) -> tuple[Shaped[Array, "B T D"]]:
    return (saved.scale * dy,)


LAYOUTS = ("interleaved", "concatenated")
FREQUENCIES = ("exclusive", "inclusive")


def example(draw):
    b, tokens, features = draw.size("B", high=2), draw.size("T"), 2 * draw.size("D / 2", high=3)
    options = {
        "positions": draw.integers(0, 40, b, tokens) if draw.choice("positions given", False, True) else None,
        "scale": draw.choice("scale", 1.0, 1.5),
        "base": draw.choice("base", 10000.0, 10.0),
        "layout": draw.choice("layout", *LAYOUTS),
        "frequencies": draw.choice("frequencies", *FREQUENCIES),
    }
    return Call((draw.array(b, tokens, features),), options)


ABOUT = About(laws=("batch_independent",), witnesses=("definition", "relation"))
