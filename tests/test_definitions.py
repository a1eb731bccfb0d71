"""Forwards against the papers' index equations, element by element: see tests/definitions."""

import importlib

import numpy as np
import pytest

from refattn.core import leaves
from refattn.draw import RandomDraw
from refattn.registry import everything

SEEDS = range(12)
DEFINED = [m for m in everything().values() if "definition" in m.ABOUT.witnesses]


def definition_of(mechanism):
    return importlib.import_module(f"tests.definitions.{mechanism}").element


@pytest.mark.parametrize("mechanism", DEFINED, ids=str)
def test_output_is_the_papers(mechanism):
    element = definition_of(mechanism)
    rng = np.random.default_rng(0)
    compared = 0
    for seed in SEEDS:
        args, options = mechanism.example(RandomDraw(seed))
        out, _ = mechanism.forward(*args, **options)
        for where, y in leaves(out):
            for _ in range(3 if y.size else 0):
                index = tuple(int(rng.integers(n)) for n in y.shape)
                expected = complex(element(args, options, where, index))
                error, size = abs(y[index] - expected), 1 + np.abs(y).max()
                assert error <= 1e-12 * size, f"{mechanism}: out{where}{index} is {y[index]}, but should be {expected}"
                compared += 1
    assert compared >= len(SEEDS)
