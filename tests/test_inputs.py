"""Inputs that expose: every family does what its words say, on calls that any candidate can be given."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention, scaled_dot_product, streaming
from refattn.core import Call, leaves
from refattn.oracle.arithmetic import BFLOAT16, FLOAT8_E4M3, FLOAT16, round_to
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.contract import Claim, claim, exercised
from refattn.oracle.inputs import CHANGES, FAMILIES, draw, draw_dout, families, rounded
from refattn.registry import everything, find

OPTIONS = frozenset(
    ("scale", "attn_mask", "is_causal", "q_offset", "window", "softcap", "q_seqlens", "kv_seqlens")
    + ("dropout_keep", "dropout_p", "return_lse")
)
EVERY = Claim(5, OPTIONS)
SEEDS = 25
SPECIAL = "nan_query", "poisoned_keys", "poisoned_values"


def calls(family, claimed=EVERY, mechanism=dot_product_attention, count=SEEDS):
    """Canonical calls of a family."""
    drawn = [draw(mechanism, family, claimed, [5, i]) for i in range(count)]
    return [as_dot_product(mechanism, call) for call in drawn if call is not None]


def logits(call):
    """(logits, whether a key takes part), (B, H, Q, K) each."""
    options = call.options | {"return_lse": False, "return_scores": "biased"}
    _, saved = dot_product_attention.forward(*call.args, **options)
    out, _ = dot_product_attention.forward(*call.args, **options)
    return out.scores, np.ones(out.scores.shape, bool) if saved.seen is None else saved.seen


def outputs(call):
    return dot_product_attention.forward(*call.args, **call.options | {"return_lse": True})[0]


# --- all families ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_calls_that_are_small_and_fit_float16(family):
    found = calls(family)
    assert len(found) > SEEDS / 2
    for call in found:
        q, k = call.args[:2]
        assert q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= 2 * 4 * 130 * 130
        for _, x in leaves(call.args):
            assert np.isfinite(x).all() or family in SPECIAL
            assert np.nanmax(np.abs(x), initial=0) <= FLOAT16.largest / 8
        k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
        products = np.abs(np.nan_to_num(q)) @ np.abs(np.nan_to_num(k)).swapaxes(-1, -2)
        assert products.max(initial=0) < FLOAT16.largest, "a score overflows float16"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_empty_rows_has_queries_without_keys(family):
    for call in calls(family):
        seen = logits(call)[1]
        lengths = call.options.get("q_seqlens")
        real = np.arange(seen.shape[2]) < (seen.shape[2] if lengths is None else lengths[:, None, None])
        empty = ~seen.any(axis=-1) & real
        assert empty.any() == (family == "empty_rows"), call.options


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_a_call(family):
    for i in range(4):
        one, again = (draw(dot_product_attention, family, EVERY, [i, 3]) for _ in range(2))
        other = draw(dot_product_attention, family, EVERY, [i, 4])
        assert (one is None) == (again is None)
        if one is not None and other is not None:
            pairs = zip(leaves(one.args), leaves(again.args), strict=True)
            assert all(np.array_equal(a, b, equal_nan=True) for (_, a), (_, b) in pairs)
            assert not np.array_equal(one.args[0], other.args[0], equal_nan=True)


def test_generic_is_said_only_where_chance_has_the_say():
    assert {name for name, family in FAMILIES.items() if not family.generic} == {"ties", *SPECIAL}
    assert not CHANGES["rounded"].generic and CHANGES["example"].generic


def test_every_family_says_what_it_is():
    assert all(name == family.name and family.words.endswith(".") for name, family in (FAMILIES | CHANGES).items())
    assert len({family.words for family in FAMILIES.values()}) == len(FAMILIES)


# --- options --------------------------------------------------------------------------------------------------


def test_every_option_and_every_pair_of_options_is_reached():
    names = sorted(OPTIONS - {"dropout_p", "return_lse"}) + ["attn_bias", "sinks"]
    sets = []
    for family in ("gaussian", "low_entropy", "signs", "one_hot"):
        sets += [exercised(call, dot_product_attention) for call in calls(family, count=400)]
    missing = {(a, b) for a in names for b in names if a < b and not any({a, b} <= each for each in sets)}
    assert not missing
    assert any(not each & {*names} for each in sets), "never a call without options"


def test_options_and_arguments_are_those_that_the_candidate_claims():
    for claimed in (Claim(3, frozenset()), Claim(3, frozenset({"is_causal"})), Claim(4, frozenset({"attn_mask"}))):
        for family in FAMILIES:
            for call in calls(family, claimed):
                assert len(call.args) == claimed.count and set(call.options) == claimed.options
    assert calls("large_masked_values", Claim(3, frozenset({"scale"}))) == []  # nothing to hide with
    assert calls("empty_rows", Claim(3, frozenset({"is_causal"}))) == []
    assert calls("poisoned_keys", Claim(3, frozenset({"q_offset"}))) == []


def test_dropout_comes_with_its_probability_or_not_at_all():
    half = Claim(3, frozenset({"dropout_keep"}))
    assert all(call.options["dropout_keep"] is None for call in calls("gaussian", half, count=100))
    both = calls("gaussian", Claim(3, frozenset({"dropout_keep", "dropout_p"})), count=100)
    on = [c for c in both if c.options["dropout_keep"] is not None]
    assert on and all(c.options["dropout_p"] > 0 for c in on)
    kept = np.concatenate([c.options["dropout_keep"].ravel() == (c.options["dropout_p"] < 0.4) for c in on])
    assert 0.4 < kept.mean() < 0.8


def test_shapes_of_masks_and_biases():
    found = calls("gaussian", count=600)
    masks = {m.shape[-2:] == (1, m.shape[-1]) or m.ndim for c in found if (m := c.options["attn_mask"]) is not None}
    assert masks >= {2, 4, True}
    biases = {b.ndim for c in found if (b := c.args[3]) is not None}
    assert biases == {2, 3, 4}
    assert {c.args[0].shape[1] // c.args[1].shape[1] for c in found} == {1, 2, 4}
    assert {c.args[2].shape[3] == c.args[0].shape[3] for c in found} == {True, False}


@pytest.mark.parametrize("rank", [3, 4])
def test_the_textbook_has_its_own_layout(rank):
    ours, found = claim(scaled_dot_product.forward, scaled_dot_product), []
    for family in families(scaled_dot_product):
        for i in range(12):
            call = draw(scaled_dot_product, family, ours, [i, 1])
            if call is not None and call.args[0].ndim == rank:
                found.append(call)
                out, _ = scaled_dot_product.forward(*call.args, **call.options)
                assert out.shape == (*call.args[0].shape[:-1], call.args[2].shape[-1])
                theirs = outputs(as_dot_product(scaled_dot_product, call)).y
                np.testing.assert_allclose(out.ravel(), theirs.ravel(), rtol=1e-9, atol=1e-10)  # logits of 2e4
    assert {c.options["mask"] is None for c in found} == {c.options["is_causal"] for c in found} == {True, False}


def test_streaming_takes_the_same_calls():
    for family in FAMILIES:
        call, same = (draw(m, family, EVERY, [2, 1]) for m in (dot_product_attention, streaming))
        assert (call is None) == (same is None)
        if call is not None:
            assert np.array_equal(call.args[0], same.args[0], equal_nan=True)
            assert call.options.keys() == same.options.keys()


# --- what a family is for ---------------------------------------------------------------------------------------


def spread(call):
    """The standard deviation of logits that are not hidden, within a head."""
    bare = call._replace(options=call.options | {"softcap": None})
    return np.std(scaled(bare), axis=(-2, -1)).mean()


def scaled(call):
    q, k = call.args[:2]
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scale = call.options.get("scale") or 1 / math.sqrt(q.shape[-1])
    return scale * (q @ k.swapaxes(-1, -2))


def test_entropy():
    low, high = (
        [spread(c) for c in calls(family, count=60) if c.args[0].shape[2] > 5]
        for family in ("low_entropy", "high_entropy")
    )
    assert 3 < np.median(low) < 10 and 0.015 < np.median(high) < 0.025


@pytest.mark.parametrize("family, level", [("shifted_up", 120), ("shifted_down", -200)])
def test_shifts(family, level):
    for call in calls(family):
        assert abs(np.median(scaled(call)) - level) < 10


def test_far_below_shows_a_mask_of_minus_ten_thousand():
    for call in calls("far_below"):
        x = scaled(call)
        assert (x < -1.1e4).all() and np.median(x) > -2.1e4
        right = outputs(call).y
        seen = logits(call)[1]
        if not seen.all() and call.args[3] is None:
            weights = np.exp(np.where(seen, x, -1e4) - np.max(np.where(seen, x, -1e4), axis=-1, keepdims=True))
            assert np.abs(weights * seen).sum(axis=-1)[~seen.all(axis=-1)].max() < 1e-9  # all weight is on masked keys
            assert np.isfinite(right).all()


def test_ramps_move_the_maximum():
    for family, sign in (("ramp_up", 1), ("ramp_down", -1)):
        slopes = [np.polyfit(np.linspace(0, 12, x.shape[-1]), x.mean(axis=(0, 1, 2)), 1)[0]
                  for c in calls(family) if (x := scaled(c)).shape[-1] > 5]  # fmt: skip
        assert np.median(slopes) == pytest.approx(sign, abs=0.2)


def test_one_key_is_chosen():
    for call in calls("hard_selection"):
        x = np.sort(scaled(call), axis=-1)
        if x.shape[-1] > 1:
            assert np.median(x[..., -1] - x[..., -2]) > 50


def test_hot_and_signed_values():
    rng = np.random.default_rng(0)
    for call in calls("one_hot"):
        dout = draw_dout(dot_product_attention, "one_hot", outputs(call).y, rng)
        assert all(((x == 0) | (x == 1)).all() and (x.sum(axis=-1) == 1).all() for x in (call.args[2], dout))
    for call in calls("signs"):
        dout = draw_dout(dot_product_attention, "signs", outputs(call).y, rng)
        assert all((np.abs(x) == 1).all() and np.abs(x.mean()) < 0.9 for x in (call.args[2], dout) if x.size > 99)


def test_offset_values_cancel():
    """y dout, which is subtracted, is much larger than what remains."""
    rng, ratios = np.random.default_rng(0), []
    for call in calls("offset_values"):
        y = outputs(call).y
        dout = draw_dout(dot_product_attention, "offset_values", y, rng)
        values = np.repeat(call.args[2], y.shape[1] // call.args[2].shape[1], axis=1)
        products = dout @ values.swapaxes(-1, -2)
        ratios.append(np.abs(products).mean() / np.abs(products - products.mean(axis=-1, keepdims=True)).mean())
    assert np.median(ratios) > 2


def test_draw_dout_is_a_tree_like_the_output():
    out = dot_product_attention.Out(np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 3)), None)
    dout = draw_dout(dot_product_attention, "gaussian", out, np.random.default_rng(0))
    assert dout.y.shape == (1, 2, 3, 4) and dout.lse.shape == (1, 2, 3) and dout.scores is None


def test_what_is_masked_is_large():
    found = 0
    for call in calls("large_masked_values"):
        some = ~logits(call)[1].all(axis=(1, 2))  # of an item: hidden from a query of it
        large = np.abs(call.args[2]).max(axis=(1, 3)) > 20
        found += large.any()
        assert not (large & ~some).any()
    assert found > SEEDS / 2


def test_values_grow():
    for call in calls("growing_values"):
        size = np.abs(call.args[2]).mean(axis=(0, 1, 3))
        if len(size) > 10:
            assert size[-3:].mean() > 5 * size[:3].mean()


def test_outliers_and_tails():
    for call in calls("outlier_channels"):
        sizes = np.sort(np.abs(call.args[1]).mean(axis=(0, 1, 2)))
        assert sizes[-1] > 3 * sizes[-2]
    tails = np.concatenate([c.args[0].ravel() for c in calls("heavy_tail")])
    assert np.abs(tails).max() > 20 and np.median(np.abs(tails)) < 1


def test_lengths():
    assert all(c.args[0].shape[2] == 1 for c in calls("one_query"))
    assert all(c.args[1].shape[2] <= 3 for c in calls("few_keys"))
    lengths = {n for c in calls("tile_edges", count=150) for n in (c.args[0].shape[2], c.args[1].shape[2])}
    assert lengths == {1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129}
    assert any(c.args[0].shape[2] != c.args[1].shape[2] for c in calls("gaussian"))


def test_ties():
    rng = np.random.default_rng(0)
    for call in calls("ties"):
        k, v = call.args[1:3]
        assert np.array_equal(k[:, :, 1::4], k[:, :, 0::4][:, :, : k[:, :, 1::4].shape[2]]) and (v > 0).all()
        assert (draw_dout(dot_product_attention, "ties", v, rng) > 0).all()


def test_one_query_is_nan_and_its_row_alone():
    for call in calls("nan_query"):
        rows = np.isnan(outputs(call).y).all(axis=-1)
        assert np.isnan(call.args[0]).all(axis=-1).sum() == 1
        assert rows.sum() == 1 or call.options["q_seqlens"] is not None
        assert np.isnan(outputs(call).y).any(axis=-1).sum() == rows.sum()


@pytest.mark.parametrize("family, place", [("poisoned_keys", 1), ("poisoned_values", 2)])
def test_poison_is_hidden_from_some_query(family, place):
    spread_by = {"multiply": 0, "skip": 0}  # how many rows are NaN
    for call in calls(family):
        x = call.args[place]
        assert np.isnan(x).sum() <= 1
        for rule in spread_by:
            convention = dot_product_attention.Convention(masked_values=rule)
            y = outputs(call._replace(options=call.options | {"convention": convention})).y
            clean = ~np.isnan(y).any(axis=-1)
            spread_by[rule] += (~clean).sum()
            others = np.isnan(x).any(axis=(2, 3)).repeat(y.shape[1] // x.shape[1], axis=1)
            assert clean[~others].all()  # other heads and items
            assert rule == "multiply" or clean.any()
    assert (spread_by["multiply"] > spread_by["skip"]) == (family == "poisoned_values"), spread_by


# --- every other mechanism ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", list(everything().values()), ids=str)
def test_families_of_every_mechanism_are_accepted_and_finite(mechanism):
    ours, found = claim(mechanism.forward, mechanism), set()
    for name in CHANGES if families(mechanism) is CHANGES else ("example",):
        for i in range(3):
            call = draw(mechanism, name, ours, [1, i])
            if call is not None:
                found.add(name)
                with np.errstate(all="ignore"):
                    out, _ = mechanism.forward(*call.args, **call.options)
                assert name == "example" or all(np.isfinite(y).all() for _, y in leaves(out))
    assert "example" in found


def test_changes_of_the_first_argument():
    linear = find("linear")
    x = {name: draw(linear, name, claim(linear.forward, linear), [4, 2]) for name in CHANGES}
    plain, others = x["example"].args[0], {name: call.args[0] for name, call in x.items()}
    assert np.array_equal(others["large"], 8 * plain) and np.array_equal(others["offset"], 4 + plain)
    assert np.array_equal(others["small"], plain / 64) and np.array_equal(others["rounded"] % 0.5, 0 * plain)
    ratio = others["outliers"] / plain
    assert set(np.unique(np.rint(ratio))) <= {1, 20} and (np.rint(ratio) == 20).any()
    assert np.array_equal(x["large"].args[1].weight, x["example"].args[1].weight)


def test_a_change_that_is_refused_or_not_finite_is_no_call():
    def refuses(x):
        if np.abs(x).max() > 3:
            raise ValueError("x is large, expected at most 3")
        return x, None

    def overflows(x):
        return np.exp(x * 1e3 * (np.abs(x) > 3)), None

    for forward in (refuses, overflows):
        mechanism = SimpleNamespace(forward=forward, example=lambda draw: Call((np.ones((2, 2)),), {}))
        assert draw(mechanism, "large", Claim(1, frozenset()), [0]) is None
        assert draw(mechanism, "small", Claim(1, frozenset()), [0]) is not None


def test_a_mechanism_of_integers_has_no_changes():
    mechanism = SimpleNamespace(forward=lambda x: (x, None), example=lambda draw: Call((np.arange(3),), {}))
    assert draw(mechanism, "example", Claim(1, frozenset()), [0]) is not None
    assert draw(mechanism, "large", Claim(1, frozenset()), [0]) is None


# --- numbers that a format holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [BFLOAT16, FLOAT16, FLOAT8_E4M3], ids=lambda f: f.name)
def test_rounded_to_a_format(form):
    call = Call((np.random.default_rng(0).normal(size=(3, 4)),), {"ids": np.arange(3), "bias": np.array(0.3)})
    once = rounded(call, form)
    assert np.array_equal(once.args[0], round_to(call.args[0], form)) and not np.array_equal(once.args[0], call.args[0])
    assert once.options["bias"] == round_to(np.array(0.3), form) and np.array_equal(once.options["ids"], np.arange(3))
    assert np.array_equal(rounded(once, form).args[0], once.args[0])


def test_rounded_to_a_dtype():
    call = Call((np.full(3, 0.1),), {})
    assert np.array_equal(rounded(call, np.float32).args[0], np.full(3, np.float64(np.float32(0.1))))
