"""The trial of a candidate: every way to be wrong is noticed, each by its name; and of a mechanism against its laws."""

import json
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import refattn
from refattn.attention.channel import squeeze_excitation
from refattn.attention.dot_product import dot_product_attention, scaled_dot_product
from refattn.core import About, Array, Call, Shaped, shaped
from refattn.draw import RandomDraw
from refattn.examples import blocked_attention, blocked_attention_with_a_bug
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.oracle.check import assert_conforms, check
from refattn.oracle.check_laws import check_laws
from refattn.oracle.contract import Departure, NotHandled
from refattn.oracle.conventions import PRESETS
from refattn.oracle.inputs import LARGEST, Stretched, draw_call
from refattn.primitives import linear, lstm_cell
from refattn.registry import find
from tests import emulated


def affine(x, params):
    return x @ params.weight.T + (0 if params.bias is None else params.bias)


def affine_backward(dout, x, params, out):
    flat_x, flat_dout = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    dbias = None if params.bias is None else flat_dout.sum(axis=0)
    return dout @ params.weight, linear.Params(flat_dout.T @ flat_x, dbias)


def tried(candidate, like="linear", **options):
    return check(candidate, like, **{"max_examples": 6} | options)


def fails(candidate, name, words, **options):
    """The report on a candidate that fails in one array only."""
    report = tried(candidate, **options)
    wrong = {n for n, verdict in report.verdicts.items() if not verdict.conforms}
    assert not report.ok and name in wrong, str(report)
    assert words in report.verdicts[name].problem + str(report), str(report)
    return report


# --- right answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, "float32", np.float16])
def test_a_right_candidate_conforms(dtype):
    report = tried(affine, backward=affine_backward, dtype=dtype)
    assert report.ok and report.examples == 6 and report.gradients == "judged", str(report)
    assert set(report.verdicts) == {"out", "dx", "dparams.weight", "dparams.bias"}
    assert report.never == () and report.passed_over == {} and not any(report.failures.values())
    assert report.dtype == str(np.dtype(dtype)) and report.framework == "numpy" and report.candidate == "affine"


def test_the_face():
    assert refattn.check is check and refattn.assert_conforms is assert_conforms
    assert refattn.assert_conforms(affine, "linear", max_examples=2).ok
    with pytest.raises(AssertionError, match="like linear, numpy float32: DIFFERS"):
        refattn.assert_conforms(lambda x, params: 1.01 * affine(x, params), "linear", max_examples=2)


def test_the_bundled_kernels():
    options = {"like": "scaled_dot_product", "max_examples": 32}
    right = check(blocked_attention.forward, backward=blocked_attention.backward, **options)
    wrong = check(blocked_attention_with_a_bug.forward, backward=blocked_attention_with_a_bug.backward, **options)
    assert right.ok, str(right)
    assert not wrong.ok and wrong.verdicts["out"].ratio > 1000 and wrong.verdicts["dv"].conforms, str(wrong)


def test_more_may_come_back_than_is_due():
    assert tried(lambda x, params: (affine(x, params), "lse")).ok
    assert tried(lambda x, params: [affine(x, params)]).ok


def test_like_may_be_a_mechanism_or_a_module():
    assert tried(affine, like=find("linear")).ok
    assert tried(affine, like=linear).ok


def test_several_outputs_have_their_names():
    def cell(x, state, params):
        return tuple(lstm_cell.forward(x, state, params)[0])

    def backward(dout, x, state, params, h, c):
        dx, dstate, dparams = lstm_cell.backward(dout, lstm_cell.forward(x, state, params)[1])
        return dx, tuple(dstate), dparams._asdict()  # a tuple will do for a NamedTuple, and so will a dict

    report = tried(cell, like="lstm_cell", backward=backward)
    assert report.ok, str(report)
    assert {"h", "c", "dx", "dstate.h", "dstate.c", "dparams.w_x"} <= set(report.verdicts)
    swapped = tried(lambda x, state, params: cell(x, state, params)[::-1], like="lstm_cell")
    assert not swapped.verdicts["h"].conforms and not swapped.verdicts["c"].conforms


def test_one_array_argument_needs_no_tuple_of_gradients():
    def softmax(s, *, axis):
        e = np.exp(s - s.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    def alone(dout, s, out, *, axis):
        return out * (dout - (dout * out).sum(axis=axis, keepdims=True))

    assert tried(softmax, like="softmax", backward=alone).ok
    assert tried(softmax, like="softmax", backward=lambda dout, s, out, *, axis: (alone(dout, s, out, axis=axis),)).ok
    assert tried(softmax, like="softmax", backward=lambda dout, s, out, **o: alone(dout, s, out, **o)).ok
    assert not tried(softmax, like="softmax", backward=lambda dout, s, out: alone(dout, s, out, axis=0)).ok


# --- wrong answers -------------------------------------------------------------------------------------------


def test_a_wrong_value():
    report = fails(lambda x, params: np.float32(1.0001) * affine(x, params), "out", "times the allowed")
    assert "expected" in str(report) and "so in 6 examples; here x (" in str(report)


def test_a_wrong_element_only():
    def candidate(x, params):
        y = affine(x, params)
        y.flat[-1] += np.float32(1e-3)
        return y

    report = fails(candidate, "out", "1 of ")
    assert report.verdicts["out"].outside == 1


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_a_number_that_is_none(special):
    def candidate(x, params):
        y = affine(x, params)
        y.flat[0] = special
        return y

    assert fails(candidate, "out", f"{special} at").verdicts["out"].ratio == np.inf


def test_a_wrong_shape():
    fails(lambda x, params: affine(x, params)[None], "out", "has shape (1, ")


def test_a_wrong_dtype():
    fails(lambda x, params: affine(x, params).astype(np.float64), "out", "has dtype float64, expected float32")


def test_nothing_comes_back():
    fails(lambda x, params: None, "out", "nothing came back")
    fails(lambda x, params: (), "out", "nothing came back")


def test_a_gradient_that_is_none():
    def backward(dout, x, params, out):
        return None, affine_backward(dout, x, params, out)[1]

    report = fails(affine, "dx", "nothing came back", backward=backward)
    assert report.verdicts["dparams.weight"].conforms


def test_a_gradient_that_is_missing():
    fails(affine, "dparams.weight", "nothing came back", backward=lambda *a: affine_backward(*a)[:1])
    fails(affine, "dx", "nothing came back", backward=lambda *a: ())


def test_a_wrong_gradient():
    def backward(dout, x, params, out):
        dx, dparams = affine_backward(dout, x, params, out)
        return dx, dparams._replace(weight=dparams.weight / 2)

    report = fails(affine, "dparams.weight", "times the allowed", backward=backward)
    assert report.verdicts["out"].conforms and report.verdicts["dx"].conforms


def test_a_candidate_that_raises():
    def candidate(x, params):
        raise FloatingPointError("out of range")

    fails(candidate, "call", "raised FloatingPointError: out of range (test_check.py, line ")
    fails(affine, "call", "raised ZeroDivisionError", backward=lambda *a: 1 / 0)


@pytest.mark.parametrize("change", ["x", "params"])
def test_a_candidate_that_changes_its_input(change):
    def candidate(x, params):
        y = affine(x, params)
        array = x if change == "x" else params.weight
        array *= 2
        return y

    report = fails(candidate, "arguments", f"{change}: changed by the candidate")
    assert report.verdicts["out"].conforms


def test_a_candidate_that_changes_an_option():
    def candidate(s, *, mask):
        out = find("softmax").forward(s, mask=mask)[0]
        if mask is not None:
            mask[...] = True
        return out

    fails(candidate, "arguments", "mask: changed by the candidate", like="softmax", max_examples=12)


def test_a_backward_that_changes_dout():
    def backward(dout, x, params, out):
        grads = affine_backward(dout, x, params, out)
        dout *= 2
        return grads

    fails(affine, "arguments", "dout: changed by the candidate", backward=backward)


def test_a_nan_that_the_reference_has_too_is_right():
    def log(x):
        with np.errstate(invalid="ignore"):
            return np.log(x)

    like = SimpleNamespace(forward=lambda x: (log(x), x), backward=None)
    options = {"example": lambda draw: Call((np.array([-1.0, 2.0]),), {}), "max_examples": 2}
    assert check(log, like, **options).ok
    assert not check(lambda x: np.nan_to_num(log(x)), like, **options).ok
    assert not check(lambda x: log(-x), like, **options).ok


# --- what was tried, and what not ----------------------------------------------------------------------------


def plain_attention(q, k, v):
    s = q @ np.swapaxes(k, -1, -2) / np.float32(np.sqrt(q.shape[-1]))
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ v


def test_options_that_the_candidate_does_not_name_stay_at_their_defaults():
    report = tried(plain_attention, like="scaled_dot_product")
    assert report.ok and report.never == ("scale", "mask", "is_causal")
    assert "never exercised: scale, mask, is_causal" in str(report)
    assert "gradients are not judged: no backward is given" in str(report) and set(report.verdicts) == {"out"}


def test_gradients_that_nobody_asked_for():
    report = tried(affine, backward=affine_backward, gradients=False)
    assert report.ok and report.gradients == "not asked for" and set(report.verdicts) == {"out"}


def test_a_named_option_must_be_heeded():
    report = tried(lambda q, k, v, *, is_causal: plain_attention(q, k, v), like="scaled_dot_product", max_examples=12)
    assert not report.ok and report.never == ("scale", "mask")


def test_all_options_may_be_taken_at_once():
    report = tried(lambda *a, **o: scaled_dot_product.forward(*a, **o)[0], like="scaled_dot_product", max_examples=12)
    assert report.ok and report.never == ()


def test_an_optional_array_may_be_left_out():
    def batch_norm(x, *, eps=1e-5, momentum=0.9):
        axes = (0, *range(2, x.ndim))
        centred = x - x.mean(axis=axes, keepdims=True)
        return centred / np.sqrt((centred * centred).mean(axis=axes, keepdims=True) + x.dtype.type(eps))

    report = tried(batch_norm, like="batch_norm")
    assert report.ok and report.never == ("params", "stats"), str(report)


def test_calls_without_sense_are_passed_over():
    """Grouped weights make no sense to a convolution that takes no groups."""

    def ungrouped(x, params, *, stride=1, padding=0, dilation=1):
        return find("conv").forward(x, params, stride=stride, padding=padding, dilation=dilation)[0]

    report = tried(ungrouped, like="conv")
    assert report.ok and report.examples == 6 and report.never == ("groups",)
    assert report.passed_over["no sense without what the candidate does not take"] > 0


def test_what_is_not_handled_is_counted_and_something_must_be():
    def square_only(x, params):
        if x.shape[-1] != params.weight.shape[0]:
            raise NotHandled("not square")
        return affine(x, params)

    report = tried(square_only)
    assert report.ok and report.examples == 6 and report.passed_over["not square"] > 6

    def nothing(x, params):
        raise NotHandled

    report = tried(nothing)
    assert not report.ok and report.examples == 0 and "NOT JUDGED" in str(report)
    assert report.passed_over == {"not handled": 120} and report.departures == {}


def test_what_is_known_to_depart_is_counted_and_named():
    def mostly(x, params):
        if x.shape[-1] != params.weight.shape[0]:
            raise Departure("somebody-not-square", "wrong unless square")
        return affine(x, params)

    report = tried(mostly)
    assert report.ok and report.departures["somebody-not-square"] == report.passed_over["wrong unless square"] > 6
    assert "departs, as is known: docs/findings/somebody-not-square.md" in str(report)


def test_the_calls_may_be_drawn_by_somebody_else():
    def example(draw):
        return Call((draw.array(5, 8), linear.init(draw.rng, 8, 3)), {})

    report = tried(affine, example=example)
    assert report.ok and "x (5, 8)" in report.verdicts["out"].example


class Unreadable:
    __signature__ = "?"

    def __call__(self, x, params):
        return affine(x, params)


@pytest.mark.parametrize(
    "candidate, like, words",
    [
        (lambda x: x, "linear", "does not take params, expected x, params"),
        (lambda x, params, scale: x, "linear", "takes scale, expected x, params"),
        (lambda x, params, *, scale: x, "linear", "takes scale, expected x, params"),
        (lambda q, k: q, "scaled_dot_product", "does not take v, expected q, k, v and any of scale, mask, is_causal"),
        (lambda x: x, "max_pool", "does not take kernel"),
        (Unreadable(), "linear", "has no signature to read, expected a function of x, params"),
    ],
)
def test_a_signature_that_does_not_fit_is_bad_use(candidate, like, words):
    with pytest.raises(ValueError, match=words):
        tried(candidate, like=like)


def test_other_bad_use():
    with pytest.raises(KeyError, match="did you mean linear"):
        tried(affine, like="liner")
    with pytest.raises(ValueError, match="dtype is int64, expected float64"):
        tried(affine, dtype=int)
    with pytest.raises(ValueError, match="framework is 'torhc', expected one of"):
        tried(affine, framework="torhc")


def test_names_that_differ_from_the_references_are_taken_by_place():
    assert tried(lambda inputs, weights: affine(inputs, weights)).ok


# --- reports -------------------------------------------------------------------------------------------------


def test_a_report_as_json():
    def candidate(x, params):
        y = affine(x, params)
        y.flat[0] = np.nan
        return y

    report = tried(candidate, seed=5)
    back = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert back["ok"] is False and back["seed"] == 5 and back["examples"] == 6 and back["like"] == "linear"
    assert back["verdicts"]["out"]["got"] == "nan" and back["verdicts"]["out"]["ratio"] == "inf"
    assert json.loads(tried(affine).to_json())["ok"] is True


def test_the_same_seed_gives_the_same_report():
    assert tried(affine, seed=1) == tried(affine, seed=1) != tried(affine, seed=2)


def test_nothing_judged_is_not_ok():
    report = tried(affine, max_examples=0)
    assert not report.ok and "NOT JUDGED (0 examples)" in str(report)


def test_stretched_calls_fill_tiles():
    lengths = []
    for i in range(60):
        call = draw_call(scaled_dot_product, scaled_dot_product.example, [0, i])
        assert sum(x.size for x in call.args) <= LARGEST
        lengths.append([call.args[0].shape[-2], call.args[1].shape[-2], call.args[0].shape[-1]])
    longest = np.max(lengths, axis=0)
    assert (longest > 32).all() and (np.sum(np.array(lengths) > 16, axis=0) >= 5).all()


def test_stretching_gives_up_where_an_example_cannot_bear_it():
    def example(draw):
        size = draw.size("N")
        if size > 4:
            raise ValueError
        return Call((draw.array(size, 2), linear.init(draw.rng, 2, 2)), {})

    assert all(len(draw_call(linear, example, [0, i]).args[0]) <= 4 for i in range(6))
    large = linear.init(np.random.default_rng(0), 2, 2)
    assert draw_call(linear, lambda draw: Call((draw.array(LARGEST, 2), large), {}), [0, 1]).args[0].size > LARGEST
    with pytest.raises(ValueError, match="expected at most"):
        Stretched([0], which=0).array(LARGEST + 1)


# --- laws ----------------------------------------------------------------------------------------------------


def test_a_mechanism_keeps_its_laws():
    report = check_laws(find("squeeze_excitation"), examples=3)
    assert report.ok and report.failures == () and report.worst <= 1e-12, str(report)
    assert report.laws == 14 and report.examples == 3 and report.family == "channel"
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def broken(**replaced):
    m = find("squeeze_excitation")
    return SimpleNamespace(
        **{
            "name": "broken", "family": "channel", "forward": m.forward, "backward": m.backward,
            "example": m.example, "ABOUT": squeeze_excitation.ABOUT,
        } | replaced
    )  # fmt: skip


def test_a_wrong_gradient_breaks_a_law_and_shows_in_the_number():
    def backward(dout, saved):
        dx, dparams = squeeze_excitation.backward(dout, saved)
        return 1.001 * dx, dparams

    report = check_laws(broken(backward=backward), examples=3)
    assert not report.ok and report.worst > 1e-5
    assert any(f.startswith("gradient_matches_complex_step, example 0 of seed 0") for f in report.failures)
    assert "broken: FAILS" in str(report) and "complex_step says" in str(report)


def test_a_gradient_that_is_nan_breaks_a_law_and_shows_in_the_number():
    def backward(dout, saved):
        dx, dparams = squeeze_excitation.backward(dout, saved)
        return dx * np.nan, dparams

    report = check_laws(broken(backward=backward), examples=1)
    assert not report.ok and np.isnan(report.worst) and report.as_dict()["worst"] == "nan"


def test_a_mechanism_that_raises_breaks_its_laws():
    def forward(x, params):
        raise RuntimeError("no forward today")

    report = check_laws(broken(forward=forward), examples=1)
    assert not report.ok and "raised RuntimeError: no forward today (test_check.py" in str(report)


class Kinked(NamedTuple):
    x: Shaped[Array, "N"]


@shaped
def kinked_forward(x: Shaped[Array, "N"]) -> tuple[Shaped[Array, "N"], Kinked]:
    return np.where(x.real > 0, x, 0), Kinked(x)


@shaped
def kinked_backward(dy: Shaped[Array, "N"], saved: Kinked) -> tuple[Shaped[Array, "N"]]:
    return (dy * (saved.x.real > 0),)


def test_kinks_are_counted_not_blamed():
    mechanism = SimpleNamespace(
        name="kinked", family="none", forward=kinked_forward, backward=kinked_backward, ABOUT=About(),
        example=lambda draw: Call((np.zeros(3),), {}),
    )  # fmt: skip
    report = check_laws(mechanism, examples=2)
    assert report.ok and report.inconclusive >= 2, str(report)


def test_other_seeds_draw_other_calls():
    seen = []

    def example(draw):
        call = squeeze_excitation.example(draw)
        seen.append(call.args[0].sum())
        return call

    check_laws(broken(example=example), examples=2, seed=1)
    check_laws(broken(example=example), examples=2, seed=2)
    assert len({round(float(s), 9) for s in seen}) >= 3
    assert RandomDraw(0).size("N") == RandomDraw(0).size("N")


# --- what the report says beyond right and wrong ---------------------------------------------------------------


def upright(q, k, v, *, scale=None):
    """Attention in float64, whatever the arrays are, in their dtype at the end."""
    s = (q.astype(float) @ np.swapaxes(k, -1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True) @ v).astype(q.dtype)


def test_the_references_own_error_is_a_small_part_of_the_bounds():
    report = tried(upright, like="scaled_dot_product", families=["gaussian", "low_entropy"], max_examples=12)
    assert report.ok and 1e-10 < report.accuracy < 1e-3
    assert f"own error is at most {report.accuracy:.1e}" in str(report)


def test_all_elements_together_show_a_scale_that_is_a_little_off():
    forward, _ = emulated.kernel(ARITHMETICS["bf16_flash"], "flash")

    def scaled(by):
        return lambda q, k, v: forward(q, k, v, scale=by * q.shape[-1] ** -0.5)[0]

    options = {"arithmetic": "bf16_flash", "dtype": "float32", "families": "gaussian", "max_examples": 48}
    assert check(scaled(1), "dot_product_attention", **options).ok
    report = check(scaled(1.0005), "dot_product_attention", **options)
    assert report.verdicts["out"].kind == "SUSPECT" and "off together" in str(report), str(report)


def test_nan_behind_a_mask_may_not_be_everywhere():
    def spread(q, k, v, *, is_causal=False):
        out = upright(q, k, v)
        return np.full_like(out, np.nan) if np.isnan(k).any() else plain(q, k, v, is_causal=is_causal)

    def plain(q, k, v, *, is_causal=False):
        allowed = np.tri(q.shape[-2], k.shape[-2], dtype=bool) if is_causal else True
        s = np.where(allowed, q @ np.swapaxes(k, -1, -2) / np.float32(np.sqrt(q.shape[-1])), -np.inf)
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) @ v

    options = {"like": "dot_product_attention", "families": ["poisoned_keys"], "max_examples": 12}

    def grouped(candidate):
        def called(q, k, v, *, is_causal=False):
            k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
            return candidate(q, k, v, is_causal=is_causal)

        return called

    with np.errstate(invalid="ignore"):
        assert check(grouped(plain), **options).ok
        wrong = check(grouped(spread), **options)
    assert not wrong.ok and wrong.verdicts["out"].kind == "BUG"


def test_what_is_outside_the_model_is_counted_and_no_pass():
    def huge(draw):
        return Call((np.full((1, 2, 64), 40.0), np.full((1, 3, 64), 40.0), draw.array(1, 3, 4)), {})

    report = check(upright, "scaled_dot_product", arithmetic="f16_eager", example=huge, max_examples=2)
    assert report.outside == {"scores of up to 1.02e+05 may overflow float16": 40} and not report.ok
    assert "outside the model, 40 examples" in str(report) and report.examples == 0


@pytest.mark.parametrize("name", ["keras_ops_torch", "keras_attention", "hf_eager"])
def test_a_convention_that_adds_a_finite_number_to_nan_has_nan(name):
    convention = PRESETS[name]
    assert convention.mask_op == "add" and convention.mask_value != -np.inf

    def follows(q, k, v, *, attn_mask=None):
        args = (x.astype(float) for x in (q, k, v))
        return dot_product_attention.forward(*args, attn_mask=attn_mask, convention=convention)[0].astype(q.dtype)

    options = {"like": "dot_product_attention", "convention": name, "gradients": False, "max_examples": 24}
    report = check(follows, families="poisoned_keys", **options)
    assert report.ok, str(report)

    def all_of_it(q, k, v, *, attn_mask=None):
        y = follows(q, k, v, attn_mask=attn_mask)
        return np.where(np.isnan(y).any(), np.nan, y)

    assert not check(all_of_it, families="poisoned_keys", **options).ok


@pytest.mark.parametrize("name", ["mlx", "flax"])
def test_rows_without_keys_are_judged_where_the_lowest_number_is_their_logit(name):
    assert PRESETS[name].mask_value == "lowest"

    def follows(q, k, v, *, attn_mask=None):
        options = {"attn_mask": attn_mask, "convention": PRESETS[name]}
        return dot_product_attention.forward(q, k, v, **options)[0]

    def doubles_them(q, k, v, *, attn_mask=None):
        y = follows(q, k, v, attn_mask=attn_mask)
        return y if attn_mask is None else np.where(attn_mask.any(axis=-1, keepdims=True), y, 2 * y)

    options = {"convention": name, "families": "empty_rows", "gradients": False, "max_examples": 8}
    assert check(follows, "dot_product_attention", **options).ok
    report = check(doubles_them, "dot_product_attention", **options)
    assert report.verdicts["out"].kind == "BUG", str(report)
