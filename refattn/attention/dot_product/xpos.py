r"""Extrapolatable position embedding (xPos).

Rotary position embedding that also makes queries smaller with their position and keys larger: their dot product
decays as they stand further apart, the faster the pair of features turns.

Paper: Sun et al., "A Length-Extrapolatable Transformer", ACL 2023 (arXiv:2212.10554), algorithm 1.

Shapes
    B items, *H heads (or nothing), T tokens of D features (an even number): D / 2 pairs.

Forward, for pair i of a query at position p, and of a key with -p / scale_base instead
    zeta_i = (2i / D + gamma) / (1 + gamma)   gamma = 0.4
    y = zeta_i^(p / scale_base) * (x turned by the angle p theta_i, as in rotary)

Backward, with a bar for "gradient of the loss with respect to"
    xbar = zeta_i^(p / scale_base) * (ybar turned back)

Choices
    scale_base = 512 is in the authors' code; algorithm 1 has zeta_i^p, which is scale_base = 1. The code counts
    from the middle of the sequence, so that neither factor gets large. Scores see differences of positions only, so
    any origin may be given; in x-transformers it moves with the length, and keys in a cache need the same one.
    Decay is for causal attention: keys after the query grow instead.
    pairing is as in rotary; the authors' is "interleaved".
"""

from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import rotary
from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped

GAMMA = 0.4


class Saved(NamedTuple):
    rotary: rotary.Saved


@shaped
def forward(
    x: Shaped[Array, "B *H T D"],
    *,
    positions: Shaped[Ints, "B T"],
    is_key: bool,
    base: float = 10000.0,
    scale_base: float = 512.0,
    pairing: str = "interleaved",
) -> tuple[Shaped[Array, "B *H T D"], Saved]:
    features = x.shape[-1]
    expect(features > 0 and features % 2 == 0, "xpos.forward: x.shape", x.shape, "a positive even number of features")
    expect(scale_base > 0, "xpos.forward: scale_base", scale_base, "more than 0")
    expect(pairing in rotary.PAIRINGS, "xpos.forward: pairing", pairing, f"one of {', '.join(rotary.PAIRINGS)}")
    zeta = (np.arange(0, features, 2) / features + GAMMA) / (1 + GAMMA)
    power = (-1 if is_key else 1) * positions[..., None] / scale_base
    tables = rotary.tables(positions, rotary.frequencies(features, base))
    cos, sin = ((zeta**power * table).astype(x.real.dtype) for table in tables)
    y, saved = rotary.forward(x, cos, sin, pairing=pairing)
    return y, Saved(saved)


@shaped
def backward(dy: Shaped[Array, "B *H T D"], saved: Saved) -> tuple[Shaped[Array, "B *H T D"]]:
    dx, _, _ = rotary.backward(dy, saved.rotary)
    return (dx,)


def example(draw):
    b, heads = draw.size("B", high=2), draw.choice("heads", (), (draw.size("H", high=2),))
    tokens, pairs = draw.size("T"), draw.size("D / 2", high=3)
    options = {
        "positions": draw.integers(-20, 20, b, tokens),
        "is_key": draw.choice("is_key", False, True),
        "base": draw.choice("base", 10000.0, 10.0),
        "scale_base": draw.choice("scale_base", 512.0, 8.0),
        "pairing": draw.choice("pairing", *rotary.PAIRINGS),
    }
    return Call((draw.array(b, *heads, tokens, 2 * pairs),), options)


ABOUT = About(laws=("batch_independent",), witnesses=("definition", "relation"))
