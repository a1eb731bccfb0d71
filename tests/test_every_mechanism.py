"""Every law, of every mechanism and primitive. A new file in refattn/attention is tested by being there."""

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from refattn.oracle.derivatives import Inconclusive
from refattn.oracle.laws import laws_of
from refattn.registry import everything
from tests.strategies import HypothesisDraw

PAIRS = [pytest.param(m, law, id=f"{m}-{law.__name__}") for m in everything().values() for law in laws_of(m)]


@pytest.mark.parametrize("mechanism, law", PAIRS)
@given(data=st.data())
def test_law(mechanism, law, data):
    call = mechanism.example(HypothesisDraw(data))
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed of the directions")
    try:
        law(mechanism, call, np.random.default_rng(seed))
    except Inconclusive:
        reject()  # Hypothesis itself complains if this happens too often
