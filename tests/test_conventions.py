"""Presets of conventions: against the definition, and against the frameworks they are of, where those are installed."""

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention
from refattn.core import leaves
from refattn.draw import RandomDraw
from refattn.oracle.conventions import PRESETS
from tests.definitions.dot_product_attention import element

ULP32 = float(np.finfo(np.float32).eps)


def same(found, expected, tolerance):
    """NaN and inf in the same places, the rest within `tolerance` of the largest entry (of 1, where all canceled)."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{found.shape}, but should be {expected.shape}"
    finite = np.isfinite(expected)
    wrong = ~finite & ~((found == expected) | (np.isnan(found) & np.isnan(expected))) | finite & ~np.isfinite(found)
    assert not wrong.any(), f"{found[wrong]}, but should be {expected[wrong]}, at {np.argwhere(wrong).tolist()}"
    if finite.any():
        error = np.abs(found[finite] - expected[finite]).max()
        largest = max(1, np.abs(expected[finite]).max())
        assert error <= tolerance * largest, f"off by {error / largest:.3g} of the largest entry, {largest:.3g}"


# --- against the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_says(name):
    """Every element of every output, empty rows and forbidding biases included."""
    convention = PRESETS[name]._replace(softmax_precision=None)  # the definition has but one precision
    for seed in range(12):
        draw = RandomDraw(seed)
        (q, k, v, bias, sinks), options = dot_product_attention.example(draw)
        if bias is not None:
            bias = np.where(draw.mask(*bias.shape), bias, -np.inf)
        args = q, k, v, bias, sinks
        stage = draw.choice("scores", *dot_product_attention.STAGES)
        options |= {"convention": convention, "return_lse": True, "return_scores": stage}
        out, _ = dot_product_attention.forward(*args, **options)
        for where, y in leaves(out):
            expected = np.array([element(args, options, where, index) for index in np.ndindex(y.shape)])
            same(y, expected.reshape(y.shape), 1e-12)


def test_every_preset_says_what_it_was_measured_with():
    assert all(p.measured for p in PRESETS.values())
    assert len(PRESETS) == 27
