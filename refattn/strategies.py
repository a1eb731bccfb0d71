"""Hypothesis strategies: calls of mechanisms, and numbers that a format holds. pip install 'refattn[strategies]'

    from hypothesis import given
    from refattn.attention.dot_product import dot_product_attention
    from refattn.strategies import attention_calls

    @given(attention_calls(options=("is_causal", "attn_mask")))
    def test_my_attention(call):
        expected, _ = dot_product_attention.forward(*call.args, **call.options)
        np.testing.assert_allclose(my_attention(*call.args, **call.options), expected, atol=1e-6)

What fails shrinks to the first family, to short lengths, and to no options.
"""

import math
from types import SimpleNamespace

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from refattn.core import expect, tree_map
from refattn.draw import RandomDraw
from refattn.oracle.arithmetic import FLOAT32, round_to
from refattn.oracle.contract import Claim
from refattn.oracle.inputs import ATTENTION_OPTIONS, FAMILIES, attention_call
from refattn.registry import find

OPTIONS = (*ATTENTION_OPTIONS, "attn_bias", "sinks", "return_lse")


@st.composite
def arrays(draw, shape, form=FLOAT32, scale=16):
    """Arrays of float64 with numbers of [-8, 8) that a refattn.oracle.arithmetic.Format holds.

        @given(arrays((3, 4), BFLOAT16))
        def test_gelu(x):
            assert_close(my_gelu(x), reference_gelu(x))

    One draw for the whole array: bytes, read as int8 / scale. They are short binary fractions, easy to read once
    shrunk. One draw of n bytes passes 3 times faster than n draws of a number, and a failure shrinks 40 times faster.
    """
    n = math.prod(shape)
    raw = draw(st.binary(min_size=n, max_size=n))
    return round_to(np.frombuffer(raw, np.int8).reshape(shape).astype(np.float64) / scale, form)[()]  # () is a number


def calls(mechanism, **sizes):
    """Calls of a mechanism, or of one by its name, as its example draws them; `sizes` are lengths by their names there.

        @given(calls("squeeze_excitation", C=4))
        def test_my_block(call):
            expected, _ = squeeze_excitation.forward(*call.args, **call.options)
    """
    mechanism = find(mechanism) if isinstance(mechanism, str) else mechanism
    if sizes:
        known = _sizes(mechanism)
        for name, n in sizes.items():
            expect(name in known, "strategies.calls: sizes", name, f"one of {', '.join(sorted(known))}")
            expect(isinstance(n, int) and n > 0, f"strategies.calls: {name}", n, "an int of at least 1")
    return _calls(mechanism, sizes)


@st.composite
def _calls(draw, mechanism, sizes):
    return mechanism.example(HypothesisDraw(SimpleNamespace(draw=draw), sizes))


def _sizes(mechanism):
    """Names of the sizes that an example asks for."""
    asked = set()

    class Asked(RandomDraw):
        def size(self, name, low=1, high=4):
            asked.add(name)
            return super().size(name, low, high)

    for seed in range(32):
        mechanism.example(Asked(seed))
    return asked


def attention_calls(options=OPTIONS, families=None):
    """Calls of dot_product_attention, of families of inputs that make mistakes visible: refattn.oracle.inputs.FAMILIES.

        @given(attention_calls(options=("is_causal", "window", "sinks"), families=("gaussian", "ramp_up")))
        def test_my_kernel(call):
            q, k, v, _, sinks = call.args

    `options` are those that may be on; with attn_bias or sinks among them args has 5 arrays or None, else q, k, v.
    Numbers are drawn from a seed: it is lengths and options that shrink.
    """
    names = set(options)
    for name in names:
        expect(name in OPTIONS, "strategies.attention_calls: options", name, f"some of {', '.join(OPTIONS)}")
    claim = Claim(5 if names & {"attn_bias", "sinks"} else 3, frozenset(names | {"dropout_p"}))
    without = tuple({"attn_bias", "sinks"} - names)
    drawn = []
    for name in FAMILIES if families is None else families:
        expect(name in FAMILIES, "strategies.attention_calls: families", name, f"some of {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        possible = not family.needs or names & set(family.needs)
        expect(families is None or possible, f"strategies.attention_calls: {name}", options, f"{family.needs} in it")
        drawn += [family._replace(without=family.without + without)] if possible else []
    return _attention_calls(claim, drawn)


@st.composite
def _attention_calls(draw, claim, families):
    family = draw(st.sampled_from(families), label="family")
    numbers = HypothesisDraw(SimpleNamespace(draw=draw), {}, draw(st.integers(0, 2**32 - 1), label="seed"))
    call = attention_call(numbers, family, claim)
    assume(call is not None)
    return call


class HypothesisDraw:
    """The questions of refattn.draw.RandomDraw, answered by Hypothesis: by what st.data() gives."""

    def __init__(self, data, sizes=None, seed=0):
        self.data, self.sizes = data, sizes or {}
        self.rng = np.random.default_rng(seed)  # of init its shapes count alone, its values are replaced by `like`

    def size(self, name, low=1, high=4):
        if name in self.sizes:
            return self.sizes[name]
        return self.data.draw(st.integers(low, high), label=name)

    def choice(self, name, *options):
        return self.data.draw(st.sampled_from(options), label=name)

    def array(self, *shape):
        return self.data.draw(arrays(shape), label=f"array{shape}")

    def mask(self, *shape):
        return self.data.draw(arrays(shape, scale=1), label=f"mask{shape}") >= 0

    def integers(self, low, high, *shape):
        raw = self.data.draw(arrays(shape, scale=1), label=f"integers{shape}")
        return low + raw.astype(np.int64) % (high - low + 1)

    def like(self, tree):
        return tree_map(lambda leaf: self.array(*leaf.shape), tree)
