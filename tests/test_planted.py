"""Emulated kernels: the right ones are right in every arithmetic, and no planted bug is inert."""

import collections

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention
from refattn.oracle.arithmetic import (
    ARITHMETICS,
    BFLOAT16,
    FLOAT8_E4M3,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FP8_ACCUMULATOR,
    TFLOAT32,
    Arithmetic,
    round_to,
)
from tests.emulated import Hooks
from tests.planted import FAULTS, HELD_OUT, KINDS, kernel

NAMES = "out", "lse", "dq", "dk", "dv", "dattn_bias", "dsinks"
SIZES = {"queries": 16, "keys": 16}
Trial = collections.namedtuple("Trial", "args options dout")


def drawn(q=37, k=41, bias=None, sinks=False, batch=2, seed=0, **options):
    """Four query heads, two heads of keys, one of values, wider than the keys."""
    rng = np.random.default_rng([seed, q, k])
    args = [rng.normal(size=s) for s in ((batch, 4, q, 8), (batch, 2, k, 8), (batch, 1, k, 12))]
    args += [None if bias is None else rng.normal(size=bias), rng.normal(size=4) if sinks else None]
    made = {name: rng.random(x) < 0.5 for name, x in options.items() if name in ("attn_mask", "dropout_keep")}
    return Trial(args, options | made, rng.normal(size=(batch, 4, q, 12)))


def changed(trial, change):
    """The trial with other q, k, v."""
    return trial._replace(args=[*change(*trial.args[:3]), *trial.args[3:]])


TRIALS = {
    "plain": drawn(),
    "one head stretched, capped": drawn(bias=(4, 1, 41), sinks=True, softcap=2.0, is_causal=True),
    "bottom right": drawn(bias=(2, 1, 37, 1), is_causal=True, q_offset="bottom_right"),
    "more queries": drawn(41, 17, is_causal=True, q_offset="bottom_right"),
    "window": drawn(bias=(1,), sinks=True, window=(5, 3), attn_mask=(2, 4, 37, 41)),
    "window at an offset": drawn(window=(9, None), q_offset=20, is_causal=True),
    "an offset for each": drawn(q_offset=np.array([0, 3]), is_causal=True),
    "padded": drawn(kv_seqlens=np.array([30, 0])),
    "padded, bottom right": drawn(kv_seqlens=np.array([39, 41]), is_causal=True, q_offset="bottom_right"),
    "dropout": drawn(dropout_keep=(2, 1, 37, 41), dropout_p=0.3, scale=0.2, softcap=1.5, bias=(37, 41)),
    "mask and causal": drawn(attn_mask=(37, 41), is_causal=True),
    "one query": drawn(1, 33, attn_mask=(2, 1, 1, 33), scale=-0.3),
    "one key": drawn(17, 1),
    "full tiles": drawn(32, 32, attn_mask=(32, 32), batch=1),
    "tiles and one more": drawn(33, 65, sinks=True),
}  # fmt: skip


def rounded(trial, arithmetic):
    args = [None if x is None else round_to(x, arithmetic.inputs) for x in trial.args]
    return Trial(args, trial.options, round_to(trial.dout, arithmetic.inputs))


def run(trial, arithmetic, algorithm="flash", fault=None, **sizes):
    """{name: array} of an emulated kernel."""
    dtype = np.float64 if arithmetic.inputs == FLOAT64 else np.float32
    args = [None if x is None else x.astype(dtype) for x in trial.args]
    forward, backward = kernel(arithmetic, algorithm, fault, **(SIZES | sizes))
    out, lse = forward(*args, **trial.options)
    found = out, lse, *backward(trial.dout.astype(dtype), *args, out, lse, **trial.options)
    assert all(x is None or x.dtype == dtype for x in found)
    return {name: x for name, x in zip(NAMES, found) if x is not None}


def reference(trial):
    (y, lse, _), saved = dot_product_attention.forward(*trial.args, return_lse=True, **trial.options)
    dout = dot_product_attention.Out(trial.dout, np.zeros_like(lse), None)
    found = y, lse, *dot_product_attention.backward(dout, saved)
    return {name: x for name, x in zip(NAMES, found) if x is not None}


def summed(trial):
    """The size of what is added up in the gradient of a bias that was stretched: the sum may be next to nothing."""
    bias = trial.args[3]
    if bias is None:
        return 1.0
    whole = np.broadcast_to(bias, (*trial.dout.shape[:3], trial.args[1].shape[2]))
    each = np.abs(reference(trial._replace(args=[*trial.args[:3], whole, trial.args[4]]))["dattn_bias"])
    stretched = tuple(i for i in range(4) if i < 4 - bias.ndim or bias.shape[i - 4] == 1)
    return each.sum(axis=stretched).max()


def difference(got, expected, bias=1.0):
    """The largest, relative to the largest number of an array and to 1; inf where NaN and infinities differ.

    The gradient of a bias is relative to `bias`, if that is more.
    """
    if got.keys() != expected.keys() or any(got[name].shape != x.shape for name, x in expected.items()):
        return np.inf
    worst = 0.0
    for name, x in expected.items():
        finite = np.isfinite(x)
        if not np.array_equal(np.isfinite(got[name]), finite) or not np.array_equal(
            got[name][~finite], x[~finite], equal_nan=True
        ):
            return np.inf
        error = np.abs(got[name][finite] - x[finite]).max(initial=0)
        least = bias if name == "dattn_bias" else 1
        worst = max(worst, error / max(least, np.abs(x[finite]).max(initial=0)))
    return worst


def coarsest(arithmetic):
    """The largest unit roundoff in an arithmetic."""
    formats = [getattr(arithmetic, name) for name in Arithmetic._fields]
    truncates = arithmetic.accumulator_truncates or arithmetic.operands_truncate
    return max(form.u for form in formats if hasattr(form, "u")) * (2 if truncates else 1)


# --- the right kernels -------------------------------------------------------------------------------------------

OTHERS = {
    "tensor cores": ARITHMETICS["bf16_flash"]._replace(accumulator_truncates=True),
    "e8m13": ARITHMETICS["fp8_flash"]._replace(accumulator=FP8_ACCUMULATOR, accumulator_truncates=True),
    "softmax in bfloat16": ARITHMETICS["bf16_eager"]._replace(softmax=BFLOAT16),
    "flushing": ARITHMETICS["f16_flash"]._replace(flush=True),
}


@pytest.mark.parametrize("algorithm", ["naive", "flash", "splitk"])
@pytest.mark.parametrize("arithmetic", [*ARITHMETICS.values(), *OTHERS.values()], ids=[*ARITHMETICS, *OTHERS])
def test_a_right_kernel_is_right(arithmetic, algorithm):
    u = coarsest(arithmetic)
    allowed = 1e-11 if arithmetic.inputs == FLOAT64 else (64 if u <= FLOAT32.u else 24) * u  # twice as measured
    for words, trial in TRIALS.items():
        trial = rounded(trial, arithmetic)
        assert difference(run(trial, arithmetic, algorithm), reference(trial), summed(trial)) <= allowed, words


@pytest.mark.parametrize("sizes", [(64, 64), (16, 32), (32, 16), (1, 7)])
@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
def test_tiles_and_their_order_do_not_matter(sizes, order):
    for splits, algorithm in ((1, "flash"), (2, "splitk"), (5, "splitk")):
        sized = {"queries": sizes[0], "keys": sizes[1], "order": order, "splits": splits}
        for words, trial in TRIALS.items():
            got = run(trial, ARITHMETICS["float64"], algorithm, **sized)
            assert difference(got, reference(trial)) <= 1e-11, words


FIELDS = {
    "out": BFLOAT16, "grad": BFLOAT16, "lse": BFLOAT16, "accumulator": BFLOAT16, "accumulator_truncates": True,
    "operands": TFLOAT32, "scaled_query": BFLOAT16, "scores": BFLOAT16, "softmax": BFLOAT16, "probs": BFLOAT16,
    "dprobs": BFLOAT16, "dscores": BFLOAT16, "saved_out": FLOAT8_E4M3, "shared_heads": BFLOAT16, "partial": BFLOAT16,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_kernel_rounds_where_the_arithmetic_says(field):
    """And the output is where it would be without, to a few units of the format."""
    trial, plain = rounded(TRIALS["bottom right"], ARITHMETICS["float32"]), ARITHMETICS["float32"]
    arithmetic = plain._replace(**{field: FIELDS[field]})
    moved = difference(run(trial, arithmetic), run(trial, plain))
    u = 2 * plain.out.u if field == "accumulator_truncates" else FIELDS[field].u
    assert u / 8 < moved < 16 * u


DEPEND = {
    "score_roundings": ({"scores": BFLOAT16, "score_roundings": 1}, {"scores": BFLOAT16, "score_roundings": 3}),
    "probs_in_dscores": ({"probs": BFLOAT16}, {"probs": BFLOAT16, "probs_in_dscores": True}),
    "probs_normalised": ({"probs": BFLOAT16}, {"probs": BFLOAT16, "probs_normalised": True}),
    "operands_truncate": ({"operands": TFLOAT32}, {"operands": TFLOAT32, "operands_truncate": True}),
    "flush": ({"dscores": FLOAT16}, {"dscores": FLOAT16, "flush": True}),
    "partial_queries": ({"partial": BFLOAT16}, {"partial": BFLOAT16, "partial_queries": 8}),
    "partial_keys": ({"partial": BFLOAT16}, {"partial": BFLOAT16, "partial_keys": 8}),
}


@pytest.mark.parametrize("field", DEPEND)
def test_fields_that_need_another_are_kept_to(field):
    trial = rounded(TRIALS["bottom right"], ARITHMETICS["float32"])
    algorithm = "naive" if field == "probs_normalised" else "flash"
    one, other = (run(trial, ARITHMETICS["float32"]._replace(**x), algorithm) for x in DEPEND[field])
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_an_unknown_option_is_refused():
    trial = TRIALS["plain"]
    with pytest.raises(TypeError, match="causal"):
        kernel(ARITHMETICS["float64"])[0](*trial.args[:3], causal=True)


# --- the planted bugs --------------------------------------------------------------------------------------------


def with_nan(q, k, v):
    q, k = q.copy(), k.copy()
    q[0, 1, 5], k[1, 1, 7, 0], k[1, 0, 4, 0] = np.nan, np.inf, -np.inf
    return q, k, v


def at_level(level):
    """Logits near a number, through one feature of q and k."""

    def change(q, k, v):
        q, k = q.copy(), k.copy()
        q[..., 0], k[..., 0] = level * 8**0.5 / 16, 16
        return q, k, v

    return change


EXTREME = {
    "hard selection": changed(drawn(sinks=True), lambda q, k, v: (12 * q, 4 * k, v)),
    "high": changed(drawn(sinks=True), at_level(120.0)),
    "low": changed(drawn(attn_mask=(37, 41)), at_level(-200.0)),
    "far below": changed(drawn(attn_mask=(37, 41)), at_level(-20000.0)),
    "NaN": changed(drawn(), with_nan),
    "large gradient": drawn()._replace(dout=64 * TRIALS["plain"].dout),
}
EXPOSING = TRIALS | EXTREME


@pytest.fixture(scope="module")
def right():
    """{(arithmetic, algorithm, words): what a right kernel gives}."""
    return {
        (name, algorithm, words): run(rounded(trial, ARITHMETICS[name]), ARITHMETICS[name], algorithm)
        for name in ("bf16_flash", "float32")
        for algorithm in ("flash", "splitk")
        for words, trial in EXPOSING.items()
    }


@pytest.mark.parametrize("fault", (FAULTS | HELD_OUT).values(), ids=FAULTS | HELD_OUT)
def test_no_fault_is_inert(fault, right):
    """What is wrong in kind is far off; what is too coarse moves some bit. float32 sees what bfloat16 hides."""
    algorithm = fault.build(Hooks()).algorithm or "flash"
    largest, moved = 0.0, False
    for name in ("bf16_flash", "float32"):
        arithmetic = ARITHMETICS[name]
        for words, trial in EXPOSING.items():
            got, expected = run(rounded(trial, arithmetic), arithmetic, fault=fault), right[name, algorithm, words]
            largest = max(largest, difference(got, expected) / coarsest(arithmetic) if name == "bf16_flash" else 0)
            moved = moved or any(not np.array_equal(got[x], expected[x], equal_nan=True) for x in expected)
    assert moved if fault.kind == "precision" else largest > 32, largest


def test_the_catalogue_is_large_and_each_fault_another():
    kinds = collections.Counter(fault.kind for fault in FAULTS.values())
    assert kinds.keys() == set(KINDS)
    assert kinds["structural"] >= 75 and kinds["precision"] >= 28 and kinds["range"] >= 12
    assert len({fault.words for fault in FAULTS.values()}) > 0.97 * len(FAULTS)
    assert all(name == fault.name for name, fault in FAULTS.items())
    assert len(HELD_OUT) >= 16 and not FAULTS.keys() & HELD_OUT.keys()
    assert {fault.words for fault in FAULTS.values()}.isdisjoint(fault.words for fault in HELD_OUT.values())


def test_a_fault_in_one_pass_leaves_the_other_alone():
    arithmetic, trial = ARITHMETICS["float32"], rounded(TRIALS["one head stretched, capped"], ARITHMETICS["float32"])
    expected = run(trial, arithmetic)
    for name, fault in FAULTS.items():
        if fault.build(Hooks()).only == "backward":
            got = run(trial, arithmetic, fault=name)
            assert all(np.array_equal(got[x], expected[x]) for x in ("out", "lse")), name
