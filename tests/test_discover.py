"""Conventions are found by experiment: every preset is found in the reference that follows it."""

import json

import numpy as np
import pytest

import refattn
from refattn.__main__ import main
from refattn.attention.dot_product import dot_product_attention as reference
from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.oracle.contract import NotHandled
from refattn.oracle.conventions import PRESETS
from refattn.oracle.discover import QUESTIONS, agrees, discover


def following(convention):
    """A function that takes every option, and follows a convention where the caller says nothing."""

    def candidate(q, k, v, attn_bias=None, sinks=None, **options):
        out, _ = reference.forward(q, k, v, attn_bias, sinks, **options, convention=convention)
        return (out.y, out.lse) if isinstance(out, reference.Out) else out

    return candidate


def said(found):
    return {f.about: f.words for f in found.found}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_found_again(name):
    convention = PRESETS[name]
    found = discover(following(convention), dtype="float32")
    assert name in found.presets, str(found)
    settled = {field: getattr(found.convention, field) for field in found.settled}
    assert agrees(convention, settled) and len(settled) >= 9, str(found)
    assert eval(found.as_preset(), {"Convention": Convention}) == found.convention
    same = [p for p, other in PRESETS.items() if other._replace(measured="") == convention._replace(measured="")]
    surely = [p for p, other in PRESETS.items() if agrees(other, settled)]
    assert set(same) <= set(surely) == set(found.presets)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_in_every_dtype(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install 'refattn[lowp]'")
    convention = Convention(mask_op="add", mask_value=-1e4, softcap_after="bias", gqa_order="tile", scale=1.0)

    def candidate(*args, **options):
        wide = [None if x is None else np.asarray(x, np.float64) for x in args]
        return following(convention)(*wide, **options).astype(args[0].dtype)

    def takes(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, softcap=None, scale=1.0):
        given = {"attn_mask": attn_mask, "is_causal": is_causal, "softcap": softcap, "scale": scale}
        return candidate(q, k, v, attn_bias, **given)

    found = discover(takes, dtype=dtype)
    fields = {name: x for name, x in convention._asdict().items() if name not in ("fully_masked", "measured")}
    assert agrees(found.convention, fields), str(found)
    assert "mask_value=-10000.0" in found.as_preset() and found.presets == (), str(found)
    assert said(found)["attn_bias"] == "is added to the scaled products"


def changed(change):
    """The reference, with its options or its answer changed."""

    def candidate(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None, window=None, softcap=None,
                  return_lse=False):  # fmt: skip
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "window": window}
        options |= {"softcap": softcap, "return_lse": return_lse}
        args, options, after = change([q, k, v, attn_bias], options)
        out, _ = reference.forward(*args, **options)
        y, lse, _ = out if isinstance(out, reference.Out) else (out, None, None)
        return after(y, lse)

    return candidate


def give(y, lse):
    return y if lse is None else (y, lse)


def negated_mask(args, options):
    mask = options["attn_mask"]
    return args, options | {"attn_mask": None if mask is None else ~mask}, give


def no_mask(args, options):
    return args, options | {"attn_mask": None}, give


def base_two(args, options):
    return args, options, lambda y, lse: y if lse is None else (y, lse / np.log(2))


def negated_lse(args, options):
    return args, options, lambda y, lse: y if lse is None else (y, -lse)


def scaled_bias(args, options):
    q, k, v, bias = args
    return [q, k, v, None if bias is None else bias * (options["scale"] or q.shape[-1] ** -0.5)], options, give


def exclusive(args, options):
    window = options["window"]
    return args, options | {"window": window and (window[0] - 1, window[1])}, give


def strictly_causal(args, options):
    if options["is_causal"]:
        mask = np.tri(args[0].shape[2], args[1].shape[2], -1, bool)[None, None]
        options = options | {"is_causal": False, "attn_mask": mask}
    return args, options, give


def bottom_right(args, options):
    return args, options | {"q_offset": "bottom_right"}, give


def other_layout(args, options):
    args = [x if x is None or i == 3 else x.swapaxes(1, 2) for i, x in enumerate(args)]
    return args, options, lambda y, lse: give(y.swapaxes(1, 2), lse)


def by_features(args, options):
    return args, options | {"scale": options["scale"] or 1 / args[0].shape[-1]}, give


@pytest.mark.parametrize(
    "change, about, words",
    [
        (negated_mask, "attn_mask", "True: the key is hidden"),
        (no_mask, "attn_mask", "it does nothing"),
        (base_two, "lse", "has base 2"),
        (negated_lse, "lse", "is negated"),
        (scaled_bias, "attn_bias", "is scaled too"),
        (exclusive, "window (3, 1)", "left without its end, from the top left"),
        (strictly_causal, "is_causal", "query i sees keys before i only"),
        (bottom_right, "is_causal", "the last query sees the last key: the diagonal ends at the bottom right"),
        (bottom_right, "window (3, 1)", "both sides inclusive, from the bottom right"),
        (other_layout, "layout", "q, k, v are (B, T, H, D)"),
        (by_features, "scale, if none is given", "1 / D"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_no_convention_says_is_found_too(change, about, words):
    found = discover(changed(change))
    assert said(found)[about] == words, str(found)
    if change is other_layout:
        ordinary = said(discover(changed(lambda args, options: (args, options, give))))
        assert {**said(found), "layout": 0} == {**ordinary, "layout": 0}, "all the rest is as it was"


@pytest.mark.parametrize("value", [-1.1e4, -7e3])
def test_a_mask_value_that_is_nobody_elses(value):
    found = discover(following(Convention(mask_value=value)))
    assert abs(found.convention.mask_value / value - 1) < 0.02, str(found)


def test_what_nothing_explains_stays_open():
    found = discover(changed(lambda args, options: (args, options, lambda y, lse: give(1.5 * y, lse))))
    assert found.settled == found.presets == () and all("none of " in words or "it " in words or "is hardly" in words or
                                       "neither" in words for words in said(found).values()), str(found)  # fmt: skip


def test_what_is_not_taken_and_not_handled_and_raises():
    def candidate(q, k, v, *, is_causal=False, softcap=None):
        if k.shape[1] != q.shape[1]:
            raise NotHandled("shared heads")
        if softcap is not None:
            raise TypeError("no caps today")
        return reference.forward(q, k, v, is_causal=is_causal)[0]

    found = said(discover(candidate))
    assert found["attn_mask"] == found["a masked value"] == "not offered: it takes no attn_mask"
    assert found["more heads of queries than of keys"] == "not handled: shared heads"
    assert found["softcap"].startswith("it raised TypeError: no caps today (test_discover.py, line ")
    assert found["lse"] == "not offered: it takes no return_lse"


def test_one_that_is_always_causal():
    def candidate(q, k, v, *, is_causal=False, attn_mask=None):
        if not is_causal:
            raise NotHandled("not causal")
        return reference.forward(q, k, v, is_causal=True, attn_mask=attn_mask, q_offset="bottom_right")[0]

    found = discover(candidate)
    assert said(found)["layout"] == "q, k, v are (B, H, T, D)" and "q_offset" in found.settled
    assert said(found)["is_causal, if it is not given"] == "not handled: not causal"
    assert found.convention.q_offset == "bottom_right" and "flash_attn" in found.presets, str(found)


def test_without_scale_or_bias_a_very_low_logit_is_only_bounded():
    def candidate(q, k, v, *, attn_mask=None):
        return following(PRESETS["jax"])(q, k, v, attn_mask=attn_mask)

    found = discover(candidate)
    assert said(found)["the logit of a masked key"].startswith("is below -8.4e+37, and not -inf"), str(found)
    assert "mask_value" not in found.settled and {"jax", "flax"} & set(found.presets)


def test_of_float64_whose_softmax_is_of_float32():
    convention = Convention(softmax_precision="float32")
    assert discover(following(convention)).convention.softmax_precision == "float32"
    assert said(discover(following(Convention())))["the softmax of float64"] == "is of float64"


def test_a_dtype_that_is_none():
    with pytest.raises(ValueError, match="discover: dtype is 'int8', expected float64"):
        refattn.discover(following(Convention()), dtype="int8")


def test_progress_names_every_question():
    asked = []
    discover(following(Convention()), progress=asked.append)
    assert asked == [about for about, _, _ in QUESTIONS]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from refattn.attention.dot_product import dot_product_attention as reference\n"
        "def attend(q, k, v, *, attn_mask=None, scale=1.0):\n"
        "    return reference.forward(q, k, v, attn_mask=attn_mask, scale=scale)[0]\n"
    )
    assert main(["discover", f"{file}:attend", "--json", str(tmp_path / "found.json")]) == 0
    out, (record,) = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())["found"]
    assert "scale, if none is given             1: it does not scale" in out
    assert "as a preset: Convention(scale=1.0" in out and record["presets"] == []
    assert record["found"]["attn_mask"] == "True: the key takes part" and "scale" in record["settled"]


def test_one_that_takes_a_mask_or_a_bias_is_asked_for_its_mask_value_without():
    def candidate(q, k, v, attn_bias=None, *, attn_mask=None, scale=None):
        if attn_bias is not None and attn_mask is not None:
            raise NotHandled("a mask or a bias")
        return following(PRESETS["jax"])(q, k, v, attn_bias, attn_mask=attn_mask, scale=scale)

    assert discover(candidate).convention.mask_value == PRESETS["jax"].mask_value


def test_one_without_float64_is_not_asked_in_what_its_softmax_is():
    found = discover(following(PRESETS["jax"]), wide=False)
    assert said(found)["the softmax of float64"] == "not offered: it takes no float64"
    assert "softmax_precision" not in found.settled
