"""The published strategies reach what they promise, and what fails shrinks to the smallest case."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from refattn.attention.dot_product import dot_product_attention
from refattn.core import leaves
from refattn.oracle.arithmetic import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, FLOAT64, round_to
from refattn.oracle.contract import exercised
from refattn.oracle.inputs import FAMILIES
from refattn.primitives import linear
from refattn.registry import everything
from refattn.strategies import OPTIONS, arrays, attention_calls, calls

QUIET = settings(database=None, deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
DRAWN = settings(QUIET, phases=(Phase.generate,), derandomize=True)


def smallest(strategy, condition):
    return find(strategy, condition, settings=settings(QUIET, derandomize=True))


def drawn(strategy, count=300):
    found = []

    @settings(DRAWN, max_examples=count)
    @given(strategy)
    def collect(value):
        found.append(value)

    collect()
    return found


# --- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FLOAT64, FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2], ids=lambda f: f.name)
def test_arrays_have_numbers_that_the_format_holds(form):
    found = np.concatenate([x.ravel() for x in drawn(arrays((3, 4), form), 100)])
    assert np.array_equal(round_to(found, form), found) and found.dtype == np.float64
    assert found.min() < -4 and found.max() > 4 and len(np.unique(found)) > 20


def test_arrays_shrink():
    x = smallest(arrays((2, 3)), lambda x: x.max() > 1)
    assert x.shape == (2, 3) and np.count_nonzero(x) == 1 and x.max() == 1 + 1 / 16


# --- calls of a mechanism -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "squeeze_excitation", "scaled_dot_product"])
def test_calls_are_accepted(name):
    mechanism = everything()[name]
    for call in drawn(calls(name), 20):
        out, _ = mechanism.forward(*call.args, **call.options)
        assert all(np.isfinite(y).all() for _, y in leaves(out))


def test_calls_of_a_module_and_of_given_sizes():
    asked = drawn(calls("scaled_dot_product", Q=3, K=2), 20)
    assert {(call.args[0].shape[-2], call.args[1].shape[-2]) for call in asked} == {(3, 2)}
    assert {call.options["is_causal"] for call in asked} == {True, False}
    assert len({call.args[0].shape for call in drawn(calls(linear), 50)}) > 3


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="sizes is 'T', expected one of B, D, E, H, K, Q"):
        calls("scaled_dot_product", T=3)
    with pytest.raises(ValueError, match="Q is 0, expected an int of at least 1"):
        calls("scaled_dot_product", Q=0)
    with pytest.raises(KeyError, match="did you mean"):
        calls("scaled_dot_produkt")


def test_calls_shrink():
    call = smallest(calls("scaled_dot_product"), lambda call: call.args[0].max() > 0)
    assert call.args[0].shape == (1, 1, 1) and call.options == {"scale": None, "mask": None, "is_causal": False}
    assert call.args[0].max() == 1 / 16 and not call.args[1].any() and not call.args[2].any()


# --- calls of attention -----------------------------------------------------------------------------------------


@functools.cache
def many():
    return drawn(attention_calls(), 400)


@settings(max_examples=30, deadline=None)
@given(attention_calls())
def test_attention_calls_are_accepted(call):
    out, _ = dot_product_attention.forward(*call.args, **call.options)
    y = out.y if call.options.get("return_lse") else out
    assert y.shape == (*call.args[0].shape[:3], call.args[2].shape[3]) and len(call.args) == 5


def test_attention_calls_reach_every_option():
    used = [exercised(call, dot_product_attention) for call in many()]
    assert set().union(*used) >= {*OPTIONS, "dropout_p"}
    assert any(not each & set(OPTIONS) for each in used)
    assert any(len(each & set(OPTIONS)) >= 3 for each in used)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_calls_reach_every_family(family):
    """By what only that family has, if it has anything; and by name."""
    marks = {
        "one_hot": lambda q, k, v: np.isin(v, (0, 1)).all(),
        "signs": lambda q, k, v: (np.abs(v) == 1).all(),
        "offset_values": lambda q, k, v: 3 < v.mean() < 5,
        "nan_query": lambda q, k, v: np.isnan(q).any(),
        "poisoned_keys": lambda q, k, v: np.isnan(k).any(),
        "poisoned_values": lambda q, k, v: np.isnan(v).any(),
        "few_keys": lambda q, k, v: k.shape[2] <= 2,
        "one_query": lambda q, k, v: q.shape[2] == 1,
        "tile_edges": lambda q, k, v: k.shape[2] in (15, 17, 31, 63, 64, 127, 128, 129),
    }
    mark = marks.get(family, lambda q, k, v: True)
    assert any(mark(*call.args[:3]) for call in drawn(attention_calls(families=(family,)), 60))
    if family in marks:
        assert any(mark(*call.args[:3]) for call in many())


def test_only_the_options_that_are_asked_for():
    for call in drawn(attention_calls(options=("is_causal", "softcap")), 100):
        assert len(call.args) == 3 and call.options.keys() <= {"is_causal", "softcap"}
    for call in drawn(attention_calls(options=("sinks",)), 100):
        assert len(call.args) == 5 and call.args[3] is None and call.options == {}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="options is 'causal', expected some of"):
        attention_calls(options=("causal",))
    with pytest.raises(ValueError, match="families is 'gauss', expected some of"):
        attention_calls(families=("gauss",))
    with pytest.raises(ValueError, match=r"far_below is \('scale',\), expected"):
        attention_calls(options=("scale",), families=("far_below",))
    assert drawn(attention_calls(options=("scale",)), 50)  # of the families that can be


def test_attention_calls_shrink_to_short_lengths_no_options_and_normal_numbers():
    call = smallest(attention_calls(), lambda call: True)
    assert call.options == {} and call.args[3] is None and call.args[4] is None
    assert [x.shape for x in call.args[:3]] == [(1, 1, 3, 4)] * 3
    assert 0.3 < np.std(call.args[0]) < 2


@pytest.mark.parametrize("name", ["is_causal", "window", "softcap", "attn_mask", "kv_seqlens"])
def test_a_failure_shrinks_to_the_option_that_makes_it(name):
    call = smallest(attention_calls(), lambda call: call.options.get(name) is not None)
    assert call.options.keys() == {name}
    assert all(n <= 4 for x in call.args[:3] for n in x.shape)


def test_a_failure_shrinks_to_the_length_that_makes_it():
    call = smallest(attention_calls(), lambda call: call.args[1].shape[2] > 16)
    assert call.args[1].shape[2] in (17, 20) and call.args[0].shape == (1, 1, call.args[0].shape[2], 4)
    assert call.args[0].shape[2] <= 3 and call.options == {}


@given(st.data())
def test_a_strategy_may_be_drawn_inside_a_test(data):
    call = data.draw(attention_calls(families=("gaussian",)))
    assert np.isfinite(call.args[0]).all()
