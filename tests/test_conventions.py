"""Presets of conventions: against the definition, and against the frameworks they are of, where those are installed."""

import importlib.metadata
import importlib.util
import inspect
import os
import types
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention
from refattn.attention.dot_product.dot_product_attention import Out
from refattn.core import leaves
from refattn.draw import RandomDraw
from refattn.oracle.conventions import PRESETS
from tests import attention_elsewhere as elsewhere
from tests.definitions.dot_product_attention import element

# Of the largest entry. Logits, and the gradients of weights, are sums of 8 products of numbers of order one: off by
# up to 10 u times the sum of their sizes, which is about 10. Not all roundings conspire: the worst seen, of a gradient,
# is 32 u.
FLOAT32 = 64 * float(np.finfo(np.float32).eps) / 2


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


@pytest.mark.parametrize("name", PRESETS)
def test_the_gradients_of_a_preset(name):
    """Against the complex step, in one random direction of everything: of y, and of lse and scores where finite."""
    convention, seen = PRESETS[name]._replace(softmax_precision=None), 0
    for seed in range(40):
        draw = RandomDraw(seed)
        args, options = dot_product_attention.example(draw)
        stage = draw.choice("scores", *dot_product_attention.STAGES)
        options |= {"convention": convention, "return_lse": True, "return_scores": stage}
        out, saved = dot_product_attention.forward(*args, **options)
        if np.isnan(out.y).any():
            continue  # of an empty row: its gradients are NaN as well
        dout = Out(*(np.where(np.isfinite(x), draw.array(*x.shape), 0) for x in out))
        grads = dot_product_attention.backward(dout, saved)
        directions = [None if x is None else draw.array(*x.shape) for x in args]
        step = 1e-30
        moved = [None if x is None else x + 1j * step * d for x, d in zip(args, directions)]
        there, _ = dot_product_attention.forward(*moved, **options)
        slope = sum((d * np.where(d == 0, 0, x.imag)).sum() / step for d, x in zip(dout, there))
        found = sum((g * d).sum() for g, d in zip(grads, directions) if g is not None)
        size = sum(np.abs(g * d).sum() for g, d in zip(grads, directions) if g is not None)
        assert abs(found - slope) <= 1e-12 * max(1, size), f"seed {seed}: {found}, but should be {slope}"
        seen += 1
    assert seen >= 10


# What the measurements say, where they do: whose corner "causal" begins in, if keys are more than queries; what a row
# of masked keys gets, in float64; whether NaN in a masked key shows.
ANSWERS = {
    "torch_sdpa": ("top", "zeros", True),
    "torch_flex": ("top", "zeros", False),
    "torch_mha": ("top", "zeros", True),
    "torch_mha_weights": ("top", "nan", True),
    "jax": ("top", "mean", False),
    "flax": ("top", "mean", False),
    "keras_ops": ("top", "mean", False),
    "keras_ops_torch": ("top", "mean", True),
    "keras_mha": ("top", "mean", False),
    "keras_mha_scores": ("top", "zeros", False),
    "keras_attention": ("top", "as without a mask", True),
    "onnx_23": ("top", "zeros", True),
    "onnx_24": ("top", "zeros", True),
    "onnx_25": ("top", "zeros", True),
    "onnx_23_legacy": ("top", "nan", True),
    "ort_attention": ("top", "zeros", True),
    "ort_mha": ("top", "nan", True),
    "ort_gqa": ("bottom", "zeros", False),
    "flash_attn": ("bottom", "zeros", False),
    "xformers": ("top", "nan", None),
    "mlx": ("bottom", "mean", False),
    "paddle": ("top", "nan", True),
    "openvino": ("top", "nan", True),
    "flashinfer": ("bottom", None, None),
    "cudnn": ("top", "nan", None),
    "hf_eager": (None, None, True),  # its masks are biases of the lowest float32, which the adapter makes
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_preset_answers_as_measured(name):
    corner, empty, leaks = ANSWERS[name]
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 3, 4))

    def attend(q, k, **options):
        return dot_product_attention.forward(q, k, v, convention=PRESETS[name], **options)

    if corner is not None:
        _, saved = attend(q[:, :, :2], k, is_causal=True)
        assert (saved.attn[0, 0, 0] > 0).sum() == {"top": 1, "bottom": 2}[corner]
    if empty is not None:
        mask = np.array([[True] * 3, [False] * 3, [True] * 3])
        y, unmasked = (attend(q, k, is_causal=False, attn_mask=m)[0][0, 0, 1] for m in (mask, None))
        expected = {"zeros": 0.0, "nan": np.nan, "mean": v[0, 0].mean(axis=0), "as without a mask": unmasked}
        np.testing.assert_allclose(y, np.broadcast_to(expected[empty], y.shape), rtol=1e-6, atol=1e-12)
    if leaks is not None:
        k[0, 0, 2] = np.nan
        y, _ = attend(q, k, is_causal=False, attn_mask=np.array([[True, True, False]]))
        assert np.isnan(y).all() if leaks else np.isfinite(y).all()


def test_every_preset_says_what_it_was_measured_with():
    assert all(p.measured for p in PRESETS.values())
    assert len(PRESETS) == 27


# --- against frameworks ---------------------------------------------------------------------------------------


def arrays(rng, queries=3, keys=5, heads=2, shared=2):
    """q, k, v and neither bias nor sinks. As many features in v as in k: some know no others."""
    shapes = (2, heads, queries, 8), (2, shared, keys, 8), (2, shared, keys, 8)
    return [*(rng.normal(size=shape) for shape in shapes), None, None]


def some(rng, *shape):
    """A mask under which every query sees something."""
    mask = rng.random(shape) < 0.6
    mask[..., 1] = True
    return mask


def plain(rng):
    return arrays(rng), {}


def scaled(rng):
    return arrays(rng), {"scale": 0.25}


def bool_mask(rng):
    return arrays(rng), {"attn_mask": some(rng, 2, 1, 3, 5)}


def bool_mask_of_heads(rng):
    return arrays(rng), {"attn_mask": some(rng, 2, 2, 3, 5)}


def bool_mask_of_keys(rng):
    return arrays(rng), {"attn_mask": some(rng, 2, 1, 1, 5)}


def float_mask(rng):
    q, k, v, _, _ = arrays(rng)
    return [q, k, v, np.where(some(rng, 2, 2, 3, 5), rng.normal(size=(2, 2, 3, 5)), -np.inf), None], {}


def float_mask_for_all(rng):
    q, k, v, _, _ = arrays(rng)
    return [q, k, v, rng.normal(size=(3, 5)), None], {}


def bool_and_float_mask(rng):
    args, _ = float_mask(rng)
    args[3] = np.where(np.isneginf(args[3]), 0, args[3])
    return args, {"attn_mask": some(rng, 2, 1, 3, 5)}


def causal_more_keys(rng):
    return arrays(rng), {"is_causal": True}


def causal_square(rng):
    return arrays(rng, 4, 4), {"is_causal": True}


def causal_more_queries(rng):
    return arrays(rng, 5, 3), {"is_causal": True}


def causal_and_mask(rng):
    return arrays(rng, 4, 4), {"is_causal": True, "attn_mask": some(rng, 2, 1, 4, 4) | (np.arange(4) == 0)}


def causal_and_float_mask(rng):
    q, k, v, _, _ = arrays(rng, 4, 4)
    return [q, k, v, rng.normal(size=(2, 2, 4, 4)), None], {"is_causal": True}


def empty_rows(rng):
    args, options = bool_mask(rng)
    options["attn_mask"][0, :, 1] = False
    options["attn_mask"][1, :, 2] = False
    return args, options


def nothing_but_masked(rng):
    return arrays(rng), {"attn_mask": np.zeros((2, 1, 1, 5), bool)}


def empty_rows_of_a_float_mask(rng):
    args, options = float_mask(rng)
    args[3][0, :, 1] = args[3][1, :, 2] = -np.inf
    return args, options


def forbidden_where_the_mask_allows(rng):
    """The keys that the mask leaves to a query have a bias of -inf."""
    args, options = bool_and_float_mask(rng)
    mask = np.broadcast_to(options["attn_mask"], args[3].shape)
    args[3][0, :, 1] = np.where(mask[0, :, 1], -np.inf, args[3][0, :, 1])
    return args, options


def logits_of_minus_infinity(rng):
    """Not by a mask: a feature of the keys is infinite."""
    args, options = arrays(rng), {}
    args[0][..., 0] = -1
    args[1][0, ..., 0] = np.inf  # all keys of one item
    args[1][1, :, 1, 0] = np.inf  # one key of the other
    return args, options


def hidden(rng, part, value):
    """A key that nobody sees, all of which is `value`."""
    args, options = bool_mask_of_keys(rng)
    options["attn_mask"][0, ..., 3] = False
    args[part][0, :, 3] = value
    return args, options


def nan_in_a_masked_key(rng):
    return hidden(rng, 1, np.nan)


def inf_in_a_masked_key(rng):
    args, options = hidden(rng, 1, 1.0)
    args[0][..., 0] = 1
    args[1][0, :, 3, 0] = np.inf  # the logit is inf, not NaN
    return args, options


def nan_in_a_masked_value(rng):
    return hidden(rng, 2, np.nan)


def inf_in_a_masked_value(rng):
    return hidden(rng, 2, np.inf)


def future(rng, part):
    args, options = causal_square(rng)
    args[part][0, :, 2] = np.nan
    return args, options


def nan_in_a_future_key(rng):
    return future(rng, 1)


def nan_in_a_future_value(rng):
    return future(rng, 2)


def nan_in_the_keys_of_an_empty_row(rng):
    args, options = empty_rows(rng)
    args[1][0, :, 3] = np.nan
    options["attn_mask"][0, :, :, 3] = False
    return args, options


def nan_under_a_float_mask(rng):
    args, options = float_mask(rng)
    args[3][0, :, :, 3] = -np.inf
    args[1][0, :, 3] = np.nan
    return args, options


def groups(rng):
    return arrays(rng, heads=4), {}


def groups_and_mask(rng):
    return arrays(rng, heads=4), {"attn_mask": some(rng, 2, 4, 3, 5)}


def groups_causal(rng):
    return arrays(rng, 3, 3, heads=4), {"is_causal": True}


def one_head_of_keys(rng):
    return arrays(rng, 4, 4, heads=3, shared=1), {"is_causal": True}


def soft_cap(rng):
    return arrays(rng), {"softcap": 0.75}


def soft_cap_and_float_mask(rng):
    return float_mask(rng)[0], {"softcap": 0.75}


def soft_cap_and_bool_mask(rng):
    args, options = bool_mask(rng)
    return args, options | {"softcap": 0.75}


def soft_cap_causal(rng):
    return arrays(rng, 4, 4), {"softcap": 0.75, "is_causal": True}


def window(rng):
    return arrays(rng, 5, 5), {"window": (1, 1)}


def window_to_the_left(rng):
    return arrays(rng, 5, 5), {"window": (2, 0), "is_causal": True}


def window_past_the_keys(rng):
    return arrays(rng, 6, 3), {"window": (1, 1)}


def sinks(rng):
    args, options = causal_square(rng)
    args[4] = rng.normal(size=2)
    return args, options


def sinks_and_empty_rows(rng):
    args, options = empty_rows(rng)
    args[4] = rng.normal(size=2)
    return args, options


def lengths_of_keys(rng):
    return arrays(rng), {"kv_seqlens": np.array([2, 5], np.int32)}


def lengths_of_both(rng):
    return arrays(rng), {"kv_seqlens": np.array([2, 5], np.int32), "q_seqlens": np.array([3, 1], np.int32)}


def cache_with_nan_at_its_end(rng):
    """One query, the newest, and keys of which the last few are padding."""
    args, options = arrays(rng, 1, 5), {"kv_seqlens": np.array([3, 5], np.int32)}
    args[1][0, :, 3:] = args[2][0, :, 3:] = np.nan
    return args, options


def no_keys(rng):
    return arrays(rng, keys=0), {}


def no_queries(rng):
    return arrays(rng, queries=0), {}


CASES = [case for name, case in globals().copy().items() if getattr(case, "__module__", "") == __name__
         and list(inspect.signature(case).parameters) == ["rng"]]  # fmt: skip


def needs(args, options):
    """What a framework must have for a call."""
    names = {name for name, value in options.items() if value is not None and value is not False}
    names |= {name for name, x in (("attn_bias", args[3]), ("sinks", args[4])) if x is not None}
    mask = options.get("attn_mask", np.empty((1, 1, 1, 1)))
    features = {"groups": args[0].shape[1] > args[1].shape[1]}
    features |= {"mask of heads": mask.shape[1] > 1, "mask of queries": mask.shape[2] > 1}
    return names | {name for name, needed in features.items() if needed}


NOTHING = types.MappingProxyType({})
BOTH = {"float64": 1e-12, "float32": FLOAT32}
NOT_EXACT = {"float64": FLOAT32, "float32": FLOAT32}  # a softmax of float32 whatever is given
ONLY_32 = {"float32": FLOAT32}


class Row(NamedTuple):
    """A function of a framework next to its preset."""

    preset: str
    run: Callable
    modules: tuple  # that have to be there
    takes: set
    dtypes: dict = BOTH
    gradients: bool = False
    but: Mapping = NOTHING  # cases it is not held to, and why
    read: Callable = lambda args, options: (args, options)  # what the call is for the preset


def version(package):
    """(1, 23) of 1.23.2."""
    return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])


def forbidding_is_masking(args, options):
    """-inf in a bias counts as a mask."""
    *arrays, bias, sinks = args
    if bias is None:
        return args, options
    mask = True if options.get("attn_mask") is None else options["attn_mask"]
    allowed = np.broadcast_to(mask & ~np.isneginf(bias), (*args[0].shape[:3], args[1].shape[2]))
    return [*arrays, bias, sinks], options | {"attn_mask": allowed}


MASKS = {"attn_mask", "attn_bias", "is_causal", "mask of heads", "mask of queries"}
NO_KEYS, NO_QUERIES = {"no_keys": "raises an error"}, {"no_queries": "raises an error"}
PROJECTED = {
    "logits_of_minus_infinity": "its projections make NaN of inf",
    "inf_in_a_masked_key": "its projections make NaN of inf",
    "inf_in_a_masked_value": "its projections make NaN of inf",
}
EMPTY = {"nan_in_the_keys_of_an_empty_row": "a row in which no key takes part is 0 there, even of NaN"}
ALIGNED = "its queries are those of the last keys"

TORCH = {
    "torch_sdpa": Row("torch_sdpa", elsewhere.torch_sdpa, ("torch",), MASKS | {"scale", "groups"}, gradients=True),
    "torch_flex": Row(
        *("torch_flex", elsewhere.torch_flex, ("torch",), MASKS | {"scale", "groups", "softcap", "window"}),
        but=NO_KEYS | NO_QUERIES,
    ),
    "torch_mha": Row("torch_mha", elsewhere.torch_mha, ("torch",), MASKS, gradients=True, but=PROJECTED),
    "torch_mha_weights": Row(
        "torch_mha_weights", elsewhere.torch_mha_weights, ("torch",), MASKS, gradients=True, but=PROJECTED
    ),
    "hf_eager": Row(
        *("hf_eager", elsewhere.hf_eager, ("torch", "transformers")),
        *(MASKS | {"scale", "groups", "sinks"}, NOT_EXACT, True),
    ),
}
JAX = {
    "jax": Row(
        *("jax", elsewhere.jax, ("jax",)),
        *(MASKS | {"scale", "groups", "window", "q_seqlens", "kv_seqlens"}, ONLY_32, True),
    ),
    "flax": Row("flax", elsewhere.flax, ("flax",), MASKS, gradients=True),
}
KERAS_MHA = {"attn_mask", "is_causal", "mask of queries", "window"}
BACKEND = os.environ.setdefault("KERAS_BACKEND", "numpy")
ON_TORCH, ON_NUMPY = BACKEND == "torch", BACKEND == "numpy"
NONE_ON_NUMPY = NO_KEYS if ON_NUMPY else {}
BUT_ON_TORCH = {"nan_in_a_future_key": "torch's flash kernel does not look there"} if ON_TORCH else {}
NOT_BOTH = {"bool_and_float_mask": "not both", "forbidden_where_the_mask_allows": "not both"} if ON_TORCH else {}
KERAS = {
    "keras_ops": Row(
        *("keras_ops_torch" if ON_TORCH else "keras_ops", elsewhere.keras_ops, ("keras",)),
        *(MASKS | {"scale"} | (set() if ON_NUMPY else {"groups"}), ONLY_32),
        but=NONE_ON_NUMPY | BUT_ON_TORCH | NOT_BOTH,
    ),
    "keras_mha": Row(
        *("keras_ops_torch" if ON_TORCH else "keras_mha", elsewhere.keras_mha, ("keras",), KERAS_MHA, ONLY_32),
        but=PROJECTED | NONE_ON_NUMPY | BUT_ON_TORCH,
    ),
    "keras_mha_scores": Row(
        *("keras_mha_scores", elsewhere.keras_mha_scores, ("keras",), KERAS_MHA, ONLY_32),
        but=PROJECTED | NONE_ON_NUMPY,
    ),
    "keras_attention": Row(
        *("keras_attention", elsewhere.keras_attention, ("keras",), {"attn_mask", "is_causal"}, ONLY_32),
        but=NONE_ON_NUMPY,
    ),
}
OF_ONNX = MASKS | {"scale", "groups", "softcap"}
OF_VERSION = (1, 23) if importlib.util.find_spec("onnx") is None else version("onnx")
ONNX = {
    f"onnx_{opset}": Row(
        f"onnx_{opset}", elsewhere.onnx_reference(opset), ("onnx",), OF_ONNX | more, but=NO_KEYS | EMPTY
    )
    for opset, more in ((23, set()), (24, set()), (25, {"window"}))
    if OF_VERSION >= (1, 23)
}
if OF_VERSION < (1, 22):
    ONNX["onnx_23_legacy"] = Row(
        *("onnx_23_legacy", elsewhere.onnx_reference(23), ("onnx",), OF_ONNX),
        but=NO_KEYS | {"causal_and_mask": "NaN everywhere: a bug"},
    )
ONNX |= {
    f"ort_attention {opset}": Row(
        *("ort_attention", elsewhere.ort_attention(opset), ("onnx", "onnxruntime"), OF_ONNX | more, ONLY_32),
        but=errors | EMPTY,
        read=forbidding_is_masking,
    )
    for opset, more, errors in (
        (23, set(), NO_KEYS | NO_QUERIES),
        (24, set(), NO_KEYS | NO_QUERIES),
        (25, {"window"}, NO_KEYS),
    )
}
ONNX |= {
    "ort_mha": Row(
        *("ort_mha", elsewhere.ort_mha, ("onnx", "onnxruntime"), MASKS | {"scale"}, ONLY_32),
        but=NO_KEYS | NO_QUERIES | {"causal_more_keys": "its last query sees everything: a bug"},
    ),
    "ort_gqa": Row(
        *("ort_gqa", elsewhere.ort_gqa, ("onnx", "onnxruntime")),
        *({"is_causal", "groups", "window", "softcap", "sinks", "kv_seqlens"}, ONLY_32),
        but=NO_KEYS
        | NO_QUERIES
        | dict.fromkeys(("causal_more_queries", "window_past_the_keys", "lengths_of_keys"), ALIGNED)
        | {
            "nan_in_a_future_key": "a row that sees NaN is 0 there",
            "nan_in_a_future_value": "it skips padding, but not the future; the preset skips both",
        },
    ),
}
OTHERS = {
    "mlx": Row("mlx", elsewhere.mlx, ("mlx",), MASKS | {"scale", "groups", "sinks"}, ONLY_32),
    "openvino": Row(
        *("openvino", elsewhere.openvino, ("openvino",), MASKS | {"scale"}, ONLY_32),
        but={"no_keys": "memory that nobody wrote to: a bug"},
    ),
    "paddle": Row(
        *("paddle", elsewhere.paddle, ("paddle",), MASKS),
        but={"inf_in_a_masked_value": "what is masked has a probability of e^-64 there, not 0"},
    ),
}
ROWS = TORCH | JAX | KERAS | ONNX | OTHERS


def calls_of(name, row):
    """A test for every case and dtype that suits; one that is skipped where the framework is not there."""
    missing = [module for module in row.modules if importlib.util.find_spec(module) is None]
    if missing:
        skipped = pytest.mark.skip(reason=f"not installed: {', '.join(missing)}")
        yield pytest.param(row, None, None, id=name, marks=skipped)
        return
    for case in CASES:
        if needs(*case(np.random.default_rng(0))) <= row.takes and case.__name__ not in row.but:
            for dtype in row.dtypes:
                yield pytest.param(row, case, dtype, id=f"{name}-{case.__name__}-{dtype}")


CALLS = [call for name, row in ROWS.items() for call in calls_of(name, row)]


@pytest.mark.frameworks
@pytest.mark.parametrize("row, case, dtype", CALLS)
def test_a_framework_is_its_preset(row, case, dtype):
    args, options = case(np.random.default_rng(0))
    args = [None if x is None else x.astype(dtype) for x in args]
    dy = np.random.default_rng(1).normal(size=(*args[0].shape[:3], args[2].shape[3])).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own
        y, lse, grads = row.run(args, options, dy if row.gradients else None)
    return_lse = lse is not None
    args, options = row.read(args, options)
    found, saved = dot_product_attention.forward(
        *args, **options, return_lse=return_lse, convention=PRESETS[row.preset]
    )
    same(y, found.y if return_lse else found, row.dtypes[dtype])
    if return_lse:
        same(lse, found.lse, row.dtypes[dtype])
    if grads is None:
        return
    dout = Out(dy, np.zeros_like(found.lse)) if return_lse else dy
    ours = [g for g in dot_product_attention.backward(dout, saved) if g is not None]
    assert len(grads) == len(ours)
    for theirs, mine in zip(grads, ours):
        same(theirs, mine, row.dtypes[dtype])


@pytest.mark.frameworks
def test_the_softmax_of_jax_is_of_float32():
    """Whatever it is given: the preset says so, and its answer in float64 is as near as float32 is, and no nearer."""
    pytest.importorskip("jax", reason="jax is not installed")
    args, options = plain(np.random.default_rng(0))
    y, _, _ = elsewhere.jax(args, options, None)
    exact, _ = dot_product_attention.forward(*args, **options)
    same(y, exact, FLOAT32)
    assert y.dtype == np.float64 and np.abs(y - exact).max() > 1e-10
