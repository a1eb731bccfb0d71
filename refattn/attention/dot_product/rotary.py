r"""Rotary position embedding (RoPE).

Queries and keys are turned, two features at a time, by angles that grow with their position: then their dot products
depend on how far apart the two are, and not on where.

Paper: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021 (arXiv:2104.09864), eq. 34.
    Scaling: Chen et al. 2023 (arXiv:2306.15595), linear; bloc97 2023, "NTK-aware"; Peng et al. 2023
    (arXiv:2309.00071), YaRN; Llama team 2024 (arXiv:2407.21783), llama3.

Shapes
    B items, *H heads (or nothing), T tokens of D features, of which F pairs are turned; cos and sin of every angle.

Forward, for each of the F pairs (a, b) of features, the other D - 2 F stay
    a' = a cos - b sin
    b' = a sin + b cos
    The tables are those of the angles p theta, for a token at position p:
    theta_i = base^(-2i / R),  R = 2 F        cos, sin = tables(positions, frequencies(R))

Backward, with a bar for "gradient of the loss with respect to"
    abar = a'bar cos + b'bar sin              turned back
    bbar = b'bar cos - a'bar sin
    cosbar = sum over heads of a a'bar + b b'bar
    sinbar = sum over heads of a b'bar - b a'bar

Choices
    pairing says which two features are a pair. "interleaved": 2i and 2i + 1, as the authors, GPT-J and Meta's LLaMA;
    "half": i and i + F, as GPT-NeoX and Hugging Face's Llama (the weights that make queries and keys are reordered
    instead); "interleaved_to_half" reads the one and writes the other, as Hugging Face's DeepSeek: the dot products of
    a query and a key are the same, their features are not. Functions called rotate_half turn either.
    Tables of fewer than D / 2 columns turn the first features only (partial rotary). Hugging Face's tables have every
    column twice: the first half of them is wanted here. ONNX's RotaryEmbedding is cos_cache[position_ids] and
    sin_cache[position_ids], interleaved=0 "half". -sin turns the other way.
    Every item has tables of its own: np.broadcast_to(cos, (B, T, F)) of one table for all.
    The functions below give the frequencies that stretch a context `factor` times; LongRoPE divides frequencies(R)
    by a factor for each. cos and sin may be multiplied by a number, as YaRN does with attention_factor: the scores
    then get its square.
    tables multiplies in float64 and rounds cos and sin to the precision of the frequencies; frameworks that multiply
    in float32 lose 1e-3 and more of the angle at positions like 100000.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped


def tables(positions, frequencies, factor=1.0):
    """cos and sin, times `factor`, of positions (...) times frequencies (F): two arrays (..., F)."""
    angles = positions[..., None] * frequencies
    return tuple((factor * f(angles)).astype(frequencies.dtype) for f in (np.cos, np.sin))


def frequencies(features, base=10000.0):
    """theta_i = base^(-2i / features), the angle from one position to the next, for half as many pairs."""
    expect(features > 0 and features % 2 == 0, "rotary.frequencies: features", features, "a positive even int")
    return base ** (-np.arange(0, features, 2) / features)


def linear(features, factor, base=10000.0):
    """Position interpolation: position p is treated as p / factor."""
    return frequencies(features, base) / factor


def ntk(features, factor, base=10000.0):
    """NTK-aware: a larger base, with which the slowest pair is `factor` times as slow and the fastest as it was.

    Dynamic NTK (Hugging Face) has factor * length / original_length - (factor - 1) in the place of factor.
    """
    expect(features > 2, "rotary.ntk: features", features, "more than 2: the fastest pair is not the slowest")
    return frequencies(features, base * factor ** (features / (features - 2)))


def yarn(features, factor, original_length, base=10000.0, *, beta_slow=1.0, beta_fast=32.0, ramp="rounded"):
    """Pairs that turn fewer than beta_slow times in the original context are interpolated, from beta_fast times not.

    Between the two the share of either is a ramp: along the number of turns in the paper ("turns"), along the index
    of the pair in the authors' code, which rounds its ends to whole pairs ("rounded"); gpt-oss does not ("unrounded").
    """
    expect(ramp in ("rounded", "unrounded", "turns"), "rotary.yarn: ramp", ramp, "'rounded', 'unrounded' or 'turns'")
    expect(beta_slow < beta_fast, "rotary.yarn: beta_slow", beta_slow, f"less than beta_fast = {beta_fast}")
    theta = frequencies(features, base)
    if ramp == "turns":
        turns = original_length * theta / (2 * math.pi)
        keep = np.clip((turns - beta_slow) / (beta_fast - beta_slow), 0, 1)
    else:
        first, last = (_pair_that_turns(beta, features, original_length, base) for beta in (beta_fast, beta_slow))
        if ramp == "rounded":
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, features - 1)
        some = "a length in which some pair turns from beta_slow to beta_fast times"
        expect(first <= last, "rotary.yarn: original_length", original_length, some)
        if first == last:
            last += 0.001
        keep = 1 - np.clip((np.arange(features // 2) - first) / (last - first), 0, 1)
    return keep * theta + (1 - keep) * theta / factor


def _pair_that_turns(times, features, length, base):
    """The index i, not rounded, with length theta_i = 2 pi times."""
    return features * math.log(length / (2 * math.pi * times)) / (2 * math.log(base))


def llama3(features, factor, original_length, base=500000.0, *, low=1.0, high=4.0):
    """YaRN's ramp as the paper has it, with other ends. No attention_factor."""
    return yarn(features, factor, original_length, base, beta_slow=low, beta_fast=high, ramp="turns")


def attention_factor(factor, mscale=1.0):
    """What YaRN multiplies cos and sin by: 0.1 mscale ln(factor) + 1, for contexts that grow.

    DeepSeek leaves cos and sin, and multiplies the scale of the scores by its square. Hugging Face divides that of
    mscale by that of mscale_all_dim, where both are given.
    """
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


# --- the rotation -------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    x: Shaped[Array, "B *H T D"]
    cos: Shaped[Array, "B T F"]
    sin: Shaped[Array, "B T F"]
    pairing: str


@shaped
def forward(
    x: Shaped[Array, "B *H T D"],
    cos: Shaped[Array, "B T F"],
    sin: Shaped[Array, "B T F"],
    *,
    pairing: str = "interleaved",
) -> tuple[Shaped[Array, "B *H T D"], Saved]:
    pairs, most = cos.shape[-1], x.shape[-1] // 2
    expect(pairs <= most, "rotary.forward: cos.shape", cos.shape, f"F of at most {most}, the pairs of x")
    expect(pairing in PAIRINGS, "rotary.forward: pairing", pairing, f"one of {', '.join(PAIRINGS)}")
    (a, b), (new_a, new_b) = (PAIRS[order](pairs) for order in PAIRINGS[pairing])
    c, s = _for_all_heads(cos, x), _for_all_heads(sin, x)
    y = x.astype(np.result_type(x, cos, sin))
    y[new_a] = x[a] * c - x[b] * s
    y[new_b] = x[a] * s + x[b] * c
    return y, Saved(x, cos, sin, pairing)


@shaped
def backward(
    dy: Shaped[Array, "B *H T D"], saved: Saved
) -> tuple[Shaped[Array, "B *H T D"], Shaped[Array, "B T F"], Shaped[Array, "B T F"]]:
    x, cos, sin, pairing = saved
    (a, b), (new_a, new_b) = (PAIRS[order](cos.shape[-1]) for order in PAIRINGS[pairing])
    c, s = _for_all_heads(cos, x), _for_all_heads(sin, x)
    dx = dy.astype(np.result_type(dy, cos, sin))
    dx[a] = dy[new_a] * c + dy[new_b] * s
    dx[b] = dy[new_b] * c - dy[new_a] * s
    heads = tuple(range(1, x.ndim - 2))
    dcos = (x[a] * dy[new_a] + x[b] * dy[new_b]).sum(axis=heads)
    dsin = (x[a] * dy[new_b] - x[b] * dy[new_a]).sum(axis=heads)
    return dx, dcos, dsin


PAIRS = {  # where the first and the second features of so many pairs are
    "interleaved": lambda pairs: ((..., slice(0, 2 * pairs, 2)), (..., slice(1, 2 * pairs, 2))),
    "half": lambda pairs: ((..., slice(0, pairs)), (..., slice(pairs, 2 * pairs))),
}
PAIRINGS = {  # read from, written to
    "interleaved": ("interleaved", "interleaved"),
    "half": ("half", "half"),
    "interleaved_to_half": ("interleaved", "half"),
}


def _for_all_heads(table, x):
    """(B, T, F) as (B, 1, ..., 1, T, F): one axis of length 1 for every axis of heads that x has."""
    return np.expand_dims(table, tuple(range(1, x.ndim - 2)))


def example(draw):
    b, heads = draw.size("B", high=2), draw.choice("heads", (), (draw.size("H", high=2),))
    tokens, pairs = draw.size("T"), draw.size("F", high=3)
    x = draw.array(b, *heads, tokens, 2 * pairs + draw.choice("features that stay", 0, 1, 2))
    tables = draw.array(b, tokens, pairs), draw.array(b, tokens, pairs)
    return Call((x, *tables), {"pairing": draw.choice("pairing", *PAIRINGS)})


ABOUT = About(laws=("batch_independent",), witnesses=("framework", "definition", "relation"))
