r"""Rotary position embedding along several axes: axial and mixed.

As rotary, but a token stands at a point of an image (or of a video): a pair of features is turned by the product of
its coordinates with a frequency for each axis.

Paper: Heo et al., "Rotary Position Embedding for Vision Transformer", ECCV 2024 (arXiv:2403.13298).

Shapes
    B items, H heads, T tokens of D features, of which F pairs are turned; A axes.

Forward, for pair f of head h of a token at the point p
    angle = sum_a p_a frequencies_ahf
    y = the pair turned by it, as in rotary

Backward, with a bar for "gradient of the loss with respect to"
    xbar, cosbar, sinbar = the backward of rotary
    anglebar = cos sinbar - sin cosbar
    frequenciesbar_ahf = sum over items and tokens of anglebar p_a

Choices
    Which pair looks at which axis is a matter of frequencies, 0 where it does not look:
    axial(...): the first pairs look at the first axis, the next at the second, each with the same range of
    frequencies; sections(...): one range over all axes, cut into parts (M-RoPE of Qwen2-VL); mixed(...): both axes at
    once, learned from where it says (the gradient is here in any case).
    The authors, as Meta's SAM 2, let x come before y; grid counts y, x, so that an image's rows are the first axis:
    reverse its last axis for theirs. pairing is as in rotary, "interleaved" in their code.
    Coordinates may be fractions, as pixels of another resolution or DINOv3's, from -1 to 1. Class tokens are left
    out, or given the point 0.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import rotary
from refattn.core import About, Array, Call, Shaped, expect, shaped


def grid(*size):
    """The coordinates of every point of a grid of this size, (points, axes), in C order: y, x of an image."""
    return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1).reshape(-1, len(size)).astype(float)


def axial(heads, features, axes=2, base=100.0):
    """(axes, heads, features / 2): every axis has its own pairs, as many as any other, with theta_i of rotary."""
    fits = features > 0 and features % (2 * axes) == 0
    expect(fits, "axial_rotary.axial: features", features, f"a positive multiple of {2 * axes}, pairs for {axes} axes")
    return sections(heads, np.tile(rotary.frequencies(features // axes, base), axes), (features // (2 * axes),) * axes)


def sections(heads, theta, sizes):
    """(axes, heads, F): of the F frequencies theta, the first sizes[0] are the first axis', and so on."""
    expect(sum(sizes) == len(theta), "axial_rotary.sections: sizes", sizes, f"{len(theta)} in all, as theta")
    owner = np.repeat(np.arange(len(sizes)), sizes)
    looks = owner == np.arange(len(sizes))[:, None]
    return np.repeat((looks * theta)[:, None], heads, axis=1)


def mixed(rng, heads, features, base=10.0):
    """(2, heads, features / 2), to be learned: two directions at right angles, turned at random for each head."""
    expect(features > 0 and features % 4 == 0, "axial_rotary.mixed: features", features, "a positive multiple of 4")
    theta = rotary.frequencies(features // 2, base)
    turn = rng.uniform(0, 2 * math.pi, (heads, 1))
    angles = np.repeat(np.concatenate([turn, turn + math.pi / 2], axis=1), len(theta), axis=1)
    return np.tile(theta, 2) * np.stack([np.cos(angles), np.sin(angles)])


# --- the rotation -------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    rotary: rotary.Saved  # of all items and heads, one after the other
    coordinates: Shaped[Array, "B T A"]


@shaped
def forward(
    x: Shaped[Array, "B H T D"],
    frequencies: Shaped[Array, "A H F"],
    *,
    coordinates: Shaped[Array, "B T A"],
    pairing: str = "interleaved",
) -> tuple[Shaped[Array, "B H T D"], Saved]:
    where, pairs, most = "axial_rotary.forward:", frequencies.shape[-1], x.shape[-1] // 2
    expect(pairs <= most, f"{where} frequencies.shape", frequencies.shape, f"F of at most {most}, the pairs of x")
    expect(pairing in rotary.PAIRINGS, f"{where} pairing", pairing, f"one of {', '.join(rotary.PAIRINGS)}")
    angles = np.einsum("bta,ahf->bhtf", coordinates, frequencies)
    y, saved = rotary.forward(*(_one_by_one(t) for t in (x, np.cos(angles), np.sin(angles))), pairing=pairing)
    return y.reshape(x.shape), Saved(saved, coordinates)


@shaped
def backward(dy: Shaped[Array, "B H T D"], saved: Saved) -> tuple[Shaped[Array, "B H T D"], Shaped[Array, "A H F"]]:
    dx, dcos, dsin = rotary.backward(_one_by_one(dy), saved.rotary)
    dangles = saved.rotary.cos * dsin - saved.rotary.sin * dcos
    dangles = dangles.reshape(*dy.shape[:3], dangles.shape[-1])
    return dx.reshape(dy.shape), np.einsum("bta,bhtf->ahf", saved.coordinates, dangles)


def _one_by_one(x):
    """(B, H, T, D) as (B H, T, D): the angles of every head are its own."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def example(draw):
    b, heads, tokens = draw.size("B", high=2), draw.size("H", high=2), draw.size("T")
    axes, pairs = draw.size("A", high=3), draw.size("F", high=3)
    x = draw.array(b, heads, tokens, 2 * pairs + draw.choice("features that stay", 0, 1))
    options = {"coordinates": draw.array(b, tokens, axes), "pairing": draw.choice("pairing", *rotary.PAIRINGS)}
    return Call((x, draw.array(axes, heads, pairs)), options)


ABOUT = About(laws=("batch_independent",), witnesses=("definition", "relation"))
