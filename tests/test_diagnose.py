"""Each named mistake, planted in code that knows nothing of the table, is found; nothing else is named."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.core import Call
from refattn.draw import RandomDraw
from refattn.oracle import contract
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.oracle.bounds import exact
from refattn.oracle.compare import BUG, Bound, Verdict
from refattn.oracle.conventions import PRESETS
from refattn.oracle.diagnose import _MOVES, CONVENTIONS, MOST, _moved, explain
from refattn.oracle.mistakes import MISTAKES
from refattn.oracle.region import region
from refattn.oracle.trial import Judge, Trial, try_call
from refattn.registry import find
from tests.planted import FAULTS, kernel
from tests.test_planted import TRIALS, drawn

ATTENTION = find("dot_product_attention")
NAMES = {m.name for m in MISTAKES}


def trials_of(forward, backward, calls, arithmetic="float64", like=ATTENTION, dtype=None):
    run = contract.with_backward(backward)
    judge = Judge(forward, like, run, ARITHMETICS[arithmetic], dtype, backward is not None)
    return [try_call(judge, call, seed=(n,)) for n, call in enumerate(calls)]


def explained(trials, arithmetic="float64", like=ATTENTION):
    return explain(like, trials, ARITHMETICS[arithmetic])


def named(trials, arithmetic="float64", like=ATTENTION):
    return [e.name for e in explained(trials, arithmetic, like)]


# --- bugs of tests.planted, in float32 ------------------------------------------------------------------------

SUITE = [*TRIALS.values(), drawn(dropout_keep=(2, 4, 37, 41)), drawn(window=(None, 4), q_offset=3)]
CALLS = [Call(tuple(t.args[: 1 + max(i for i, x in enumerate(t.args) if x is not None)]), t.options) for t in SUITE]
OTHER_NAMES = {  # of the table, for planted bugs with names of their own
    "causal_by_eights": "causal_by_groups",
    "causal_not_in_backward": "causal_ignored",
    "mask_not_in_backward": "mask_ignored",
    "bias_not_in_backward": "bias_ignored",
    "shared_heads_of_last": "shared_heads_not_summed",
    "shared_heads_averaged": "shared_heads_not_summed",
    "value_as_wide_as_key": "values_cut_to_query_width",
    "sink_in_every_part": "sink_counted_again",
    "sink_gradient_negated": "dsinks negated",
    "sink_gradient_of_first_item": "dsinks of the first item",
    "dropout_missing_in_dweights": "dropout_missing_in_dp",
    "dropout_before_the_sum": "dropout_as_mask",
    "rescaled_after_adding": "accumulator_rescaled_late",
    "lse_of_empty_row_zero": "lse_of_empty_row",
    "dv_of_unnormalised": "dv_not_normalised",
    "dk_dv_miss_first_queries": "first_query_tile_dropped",
}
UNNAMED = "causal_leaks_one_entry", "one_row_not_rescaled", "stale_value_tile", "parts_averaged", "dlogits_clipped"
PRECISION = "probs_truncated", "scale_off_by_1e-3", "softmax_low", "dscores_of_low_probs", "operands_tf32", "lse_low"


def names_of(fault):
    """In the table."""
    if fault.name in OTHER_NAMES:
        return (OTHER_NAMES[fault.name],)
    asked = (fault.diagnosis,) if isinstance(fault.diagnosis, str) else fault.diagnosis or ()
    return asked or ((fault.name,) if fault.name in NAMES else ())


def trials_of_kernel(fault, arithmetic="float32", calls=CALLS):
    forward, backward = kernel(ARITHMETICS[arithmetic], fault=fault, queries=16, keys=16)
    return trials_of(forward, backward, calls, arithmetic, dtype=np.dtype(np.float32))


@pytest.mark.parametrize("name", [f.name for f in FAULTS.values() if names_of(f)])
def test_planted_bugs_are_named(name):
    trials = trials_of_kernel(name)
    assert not all(t.conforms for t in trials)
    assert set(named(trials, "float32")[:2]) & set(names_of(FAULTS[name]))


@pytest.mark.parametrize(
    "name, arithmetic",
    [(n, "float32") for n in (*UNNAMED, *PRECISION)] + [(n, "bf16_flash") for n in ("dweights_truncated", "total_low")],
)
def test_other_bugs_get_no_name_but_a_place(name, arithmetic):
    failed = [t for t in trials_of_kernel(name, arithmetic, CALLS[:7]) if not t.conforms][:2]
    assert failed and not explained(failed, arithmetic)
    assert all(region(t) for t in failed)


@pytest.mark.parametrize("name", ["causal_ignored", "d_missing", "softcap_ignored", "key_shifted", "dq_scale_missing"])
def test_they_are_named_in_bfloat16_too(name):
    assert name in named(trials_of_kernel(name, "bf16_flash"), "bf16_flash")[:2]


@pytest.mark.parametrize("arithmetic", ["float32", "bf16_flash", "f16_flash"])
def test_what_is_right_is_not_named(arithmetic):
    trials = trials_of_kernel(None, arithmetic)
    assert all(t.conforms for t in trials)
    assert explained(trials, arithmetic) == ()
    assert all(region(t) == "" for t in trials)


# --- attention in plain NumPy, with knobs ------------------------------------------------------------------------


def attention(q, k, v, bias, sinks, options, knobs):
    """(out, lse). A knob is a function of a variable of that name, and of the call, that gives another."""
    o = SimpleNamespace(**(DEFAULTS | options), queries=q.shape[2], keys=k.shape[2], q=q, k=k, v=v, real_bias=bias)

    def turned(name, x):
        return knobs[name](x, o) if name in knobs else x

    q, k, v = turned("qkv", (q, k, v))
    bias, sinks = turned("bias", bias), turned("sinks", sinks)
    heads, d = q.shape[1], q.shape[3]
    k, v = turned("of_heads", (k.repeat(heads // k.shape[1], 1), v.repeat(heads // v.shape[1], 1)))
    o.scale_given = o.scale is not None
    o.scale = 1 / math.sqrt(d) if o.scale is None else o.scale
    scale = turned("scale", o.scale)
    keep = turned("keep", o.dropout_keep)
    lengths = turned("lengths", o.kv_seqlens)
    offset = turned("offset", np.zeros(len(q), int) if o.q_offset is None else o.q_offset)
    o.p = np.arange(o.queries)[None, None, :, None] + np.broadcast_to(offset, len(q))[:, None, None, None]
    o.j = np.arange(o.keys)
    seen = np.ones((len(q), heads, o.queries, o.keys), bool)
    if o.attn_mask is not None:
        seen &= turned("mask", o.attn_mask)
    if o.is_causal:
        seen &= turned("causal", o.j <= o.p)
    if lengths is not None:
        seen &= o.j < np.reshape(lengths, (-1, 1, 1, 1))
    seen = turned("seen", seen)
    s = scale * np.einsum("bhid,bhjd->bhij", q, k)
    if o.softcap is not None:
        s = turned("cap", lambda x: o.softcap * np.tanh(x / o.softcap))(s)
    s = s if bias is None else s + bias
    s = turned("logits", s)
    top = np.where(seen, s.real, -1e300).max(axis=-1, keepdims=True)
    top = top if sinks is None else np.maximum(top, sinks.real[:, None, None])
    e = np.where(seen, np.exp(np.where(seen, s - top, 0)), 0)
    total = e.sum(axis=-1, keepdims=True) + (0 if sinks is None else np.exp(sinks[:, None, None] - top))
    empty = total == 0
    e = e if keep is None else turned("dropped", e * keep / (1 - o.dropout_p))
    o.top, o.total, o.empty, o.s, o.seen, o.sinks = top[..., 0], total[..., 0], empty[..., 0], s, seen, sinks
    out = turned("tiles", np.einsum("bhij,bhje->bhie", e, v) / np.where(empty, 1, total))
    lse = np.where(empty, -np.inf, top + np.log(np.where(empty, 1, total)))[..., 0].real
    lse = turned("lse", lse)
    lengths = turned("rows", o.q_seqlens)
    if lengths is not None:
        beyond = np.arange(o.queries) >= np.reshape(lengths, (-1, 1, 1))
        out, lse = np.where(beyond[..., None], 0, out), np.where(beyond, -np.inf, lse)
    return turned("out", out), lse


DEFAULTS = dict.fromkeys(
    ("scale", "attn_mask", "q_offset", "softcap", "kv_seqlens", "q_seqlens", "dropout_keep"), None
) | {"is_causal": False, "dropout_p": 0.0}  # fmt: skip


def candidate(knobs):
    """(forward, backward); the gradients are derivatives of the forward, wrong as it is, by complex steps."""

    def forward(q, k, v, attn_bias=None, sinks=None, **options):
        return attention(q, k, v, attn_bias, sinks, options, knobs)

    def backward(dout, q, k, v, attn_bias, sinks, out, lse, **options):
        args = [q, k, v, attn_bias, sinks]
        grads = [slopes(dout, args, n, options, knobs) for n in range(5)]
        return knobs["grads"](grads, (dout, args, options)) if "grads" in knobs else grads

    return forward, backward


def slopes(dout, args, n, options, knobs):
    if args[n] is None:
        return None
    grad = np.zeros(args[n].shape)
    for place in np.ndindex(grad.shape):
        moved = args[n].astype(complex)
        moved[place] += 1e-30j
        out, _ = attention(*args[:n], moved, *args[n + 1 :], options, knobs)
        grad[place] = (dout * out.imag).sum() / 1e-30
    return grad


def calls():
    rng = np.random.default_rng(0)

    def of(shapes, bias=None, sinks=None, **options):
        arrays = [None if s is None else rng.normal(size=s) for s in (*shapes, bias, sinks)]
        return Call(tuple(arrays), options)

    square, grouped = [(2, 2, 4, 3)] * 3, [(2, 4, 3, 3), (2, 2, 5, 3), (2, 1, 5, 4)]
    mask = np.array(rng.random((2, 2, 4, 4)) < 0.6)
    mask[0, :, 1] = False
    mask[1, :, 2] = True
    return [
        of(square, (2, 2, 4, 4), attn_mask=mask, q_seqlens=np.array([3, 4])),
        of(square, None, None, is_causal=True, dropout_keep=rng.random((2, 2, 4, 4)) < 0.6, dropout_p=0.2),
        of(grouped, (1, 1, 1, 5), (4,), kv_seqlens=np.array([5, 3]), is_causal=True, q_offset=np.array([0, 2])),
        of(grouped, None, None, softcap=1.5, scale=0.8),
        of([(1, 1, 19, 2), (1, 1, 35, 2), (1, 1, 35, 2)]),
    ]


PLAIN = calls()


def test_the_candidate_with_knobs_is_right():
    trials = trials_of(*candidate({}), PLAIN)
    assert all(t.conforms for t in trials), [str(v) for t in trials for v in t.verdicts if not v.conforms]
    assert explained(trials) == ()


def first(x, axis):
    """The first along an axis, wherever it is asked for."""
    return None if x is None else np.repeat(np.take(x, [0], axis), x.shape[axis], axis)


def if_alike(change):
    """A change of (q, k, v), where their shapes are one."""
    return lambda qkv, o: change(*qkv) if len({x.shape for x in qkv}) == 1 else qkv


def misread(x):
    b, h, t, d = x.shape
    return x.reshape(b, t, h, d).transpose(0, 2, 1, 3)


def by_tiles(shrink_total, late=False):
    """The output of an online softmax that forgets to rescale, in tiles of 16 keys."""

    def out(_, o):
        first = -np.inf if o.sinks is None else o.sinks[:, None, None]
        acc, total, top = 0.0, float(o.sinks is not None), first + np.zeros((*o.s.shape[:3], 1))
        values = o.v.repeat(o.s.shape[1] // o.v.shape[1], 1)
        kept = 1 if o.dropout_keep is None else o.dropout_keep / (1 - o.dropout_p)
        for start in range(0, o.keys, 16):
            s = np.where(o.seen, o.s, -np.inf)[..., start : start + 16]
            new = np.maximum(top, s.real.max(axis=-1, keepdims=True))
            new = np.where(np.isneginf(new), 0, new)
            shrink, e = np.exp(top - new), np.where(np.isneginf(s.real), 0, np.exp(s - new))
            acc = acc + (e * (kept if o.keys < 16 else 1)) @ values[:, :, start : start + 16]
            acc = acc * shrink if late else acc
            total = (total * shrink if shrink_total else total) + e.sum(axis=-1, keepdims=True)
            top = new
        o.total = total
        return acc / np.where(total == 0, 1, total)

    return out


def over_queries(_, o):
    """The softmax over the other axis."""
    e = np.where(o.seen, np.exp(np.where(o.seen, o.s, 0)), 0)
    if o.q_seqlens is not None:
        e = e * (np.arange(o.queries)[:, None] < np.reshape(o.q_seqlens, (-1, 1, 1, 1)))
    total = e.sum(axis=2, keepdims=True)
    kept = 1 if o.dropout_keep is None else o.dropout_keep / (1 - o.dropout_p)
    return (e / np.where(total == 0, 1, total) * kept) @ o.v.repeat(o.s.shape[1] // o.v.shape[1], 1)


def scaled(factor, *which):
    def grads(grads, call):
        scale = call[2].get("scale") or 1 / math.sqrt(call[1][0].shape[3])
        return [g * factor(scale) if n in which else g for n, g in enumerate(grads)]

    return {"grads": grads}


def summed_over_wrong_heads(grads, call):
    dout, (q, *kv, bias, sinks), options = call
    whole = [q, *(x.repeat(q.shape[1] // x.shape[1], 1) for x in kv), bias, sinks]
    for n in (1, 2):
        g = slopes(dout, whole, n, options, {})
        shared = kv[n - 1].shape[1]
        grads[n] = g.reshape(len(g), -1, shared, *g.shape[2:]).sum(axis=1)
    return grads


def lse_knob(change):
    return {"lse": lambda lse, o: np.where(o.empty, -np.inf, change(lse, o))}


KNOBS = {
    "softmax_over_queries": {"tiles": over_queries},
    "not_normalised": {"tiles": lambda y, o: y * np.where(o.empty, 1, o.total)[..., None]},
    "last_queries_zero": {"out": lambda y, o: y * (np.arange(o.queries) < o.queries // 16 * 16)[:, None]},
    "scale_inverse": {"scale": lambda s, o: 1 / s},
    "scale_root_missing": {"scale": lambda s, o: s if o.scale_given else 1 / o.q.shape[3]},
    "scale_from_model_width": {"scale": lambda s, o: s if o.scale_given else (o.q.shape[1] * o.q.shape[3]) ** -0.5},
    "scale_from_padded_width": {"scale": lambda s, o: s if o.scale_given else 16**-0.5},
    "scale_negative": {"scale": lambda s, o: -s},
    "causal_reversed": {"causal": lambda x, o: o.j >= o.p},
    "q_offset_of_first_item": {"offset": lambda x, o: np.full_like(x, x[0])},
    "kv_seqlens_one_less": {"lengths": lambda n, o: None if n is None else n - 1},
    "q_seqlens_ignored": {"rows": lambda n, o: None},
    "mask_transposed": {"mask": lambda m, o: m.swapaxes(2, 3)},
    "softcap_not_divided": {"cap": lambda f, o: lambda x: o.softcap * np.tanh(x)},
    "bias_subtracted": {"bias": lambda x, o: None if x is None else -x},
    "bias_of_first_item": {"bias": lambda x, o: first(x, 0)},
    "bias_of_first_query": {"bias": lambda x, o: first(x, 2)},
    "heads_tiled_in_backward": {"grads": summed_over_wrong_heads},
    "values_of_first_item": {"qkv": lambda x, o: (x[0], x[1], first(x[2], 0))},
    "keys_and_values_of_first_item": {"qkv": lambda x, o: (x[0], first(x[1], 0), first(x[2], 0))},
    "values_of_next_head": {"qkv": lambda x, o: (x[0], x[1], np.roll(x[2], -1, 1))},
    "keys_as_values": {"qkv": lambda x, o: (x[0], x[1], x[1 if x[1].shape == x[2].shape else 2])},
    "values_as_keys": {"qkv": lambda x, o: (x[0], x[2 if x[1].shape == x[2].shape else 1], x[2])},
    "keys_as_queries": {"qkv": if_alike(lambda q, k, v: (k, k, v))},
    "queries_as_keys": {"qkv": if_alike(lambda q, k, v: (q, q, v))},
    "q_and_k_swapped": {"qkv": if_alike(lambda q, k, v: (k, q, v))},
    "layout_mistaken": {"qkv": lambda x, o: tuple(map(misread, x))},
    "out_not_transposed": {"out": lambda y, o: y.transpose(0, 2, 1, 3).reshape(y.shape)},
    "sink_subtracted": {"sinks": lambda x, o: None if x is None else -x},
    "one_added_to_sum": {"sinks": lambda x, o: np.zeros(o.q.shape[1]) if x is None else x},
    "dropout_scaled_by_p": {"dropped": lambda e, o: e * (1 - o.dropout_p) / o.dropout_p},
    "dropout_of_first_head": {"keep": lambda x, o: first(x, 1)},
    "lse_is_max": lse_knob(lambda lse, o: o.top.real),
    "lse_without_log": lse_knob(lambda lse, o: np.exp(lse)),
    "lse_negative": lse_knob(lambda lse, o: -lse),
    "dq_dk_scale_missing": scaled(lambda s: 1 / s, 0, 1),
    "dq_dk_scale_twice": scaled(lambda s: s, 0, 1),
    "dq_of_base_2": scaled(lambda s: math.log(2), 0),
    "dk_of_base_2": scaled(lambda s: 1 / math.log(2), 1),
    "dq_dk_of_base_2": scaled(lambda s: math.log(2), 0, 1),
    "first_key_dropped": {"seen": lambda x, o: x & (o.j > 0)},
    "softmax_base_2": {"logits": lambda s, o: s * math.log(2), "sinks": lambda x, o: x},
    "softmax_log2e_twice": {"logits": lambda s, o: s / math.log(2)},
    "nothing_rescaled": {
        "tiles": by_tiles(shrink_total=False),
        "lse": lambda lse, o: np.where(o.empty, -np.inf, o.top + np.log(np.where(o.empty, 1, o.total[..., 0]))),
    },
}


@pytest.mark.parametrize("name", KNOBS)
def test_mistakes_are_named(name):
    forward, backward = candidate(KNOBS[name])
    trials = trials_of(forward, None if "tiles" in KNOBS[name] else backward, PLAIN)  # a maximum is not complex
    assert not all(t.conforms for t in trials)
    assert name in named(trials)[:2]


def test_every_mistake_is_planted_somewhere():
    elsewhere = {"empty_row_zero"}  # below
    planted = {name for fault in FAULTS.values() for name in names_of(fault)}
    assert planted | set(KNOBS) | elsewhere >= NAMES
    assert len(NAMES) == len(MISTAKES)


def test_a_row_without_keys_by_its_own_convention():
    call = PLAIN[0]._replace(options=PLAIN[0].options | {"convention": Convention(fully_masked="nan")})
    assert "empty_row_zero" in named(trials_of(candidate({})[0], None, [call]))


# --- conventions, several mistakes, and what refutes --------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch_mha_weights", "hf_eager", "onnx_23_legacy", "flash_attn", "gpt_oss", "cudnn"])
def test_other_conventions_are_named(name):
    """The reference itself, under a convention that was not asked for."""

    def forward(*args, **options):
        (y, lse, _), _ = ATTENTION.forward(*args, return_lse=True, **options, convention=exact(PRESETS[name]))
        return y, lse

    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(1, 2, n, 4)) for n in (4, 6, 6))
    mask = rng.random((1, 2, 4, 6)) < 0.5
    mask[:, :, 2] = False
    calls = [Call((q, k, v), {"attn_mask": mask, "softcap": 1.5}), Call((q, k, v), {"is_causal": True})]
    calls += [Call((q, k, v), {"attn_mask": mask[0, 0]}), Call((q, k, v), {})]
    found = explained(trials_of(forward, None, calls))
    assert any(name in e.words for e in found), found
    assert len(found) <= MOST


def test_conventions_that_agree_are_told_together():
    told = [name for row in CONVENTIONS for name in row.words[len("answers as ") : -len(" does")].split(" or ")]
    assert sorted(n for part in told for n in part.split(", ")) == sorted(PRESETS)
    assert len(CONVENTIONS) < len(PRESETS)


@pytest.mark.parametrize(
    "first, second",
    [
        ("scale_negative", "bias_of_first_query"),
        ("causal_reversed", "dropout_scaled_by_p"),
        ("scale_negative", "lse_negative"),
    ],
)
def test_two_mistakes_at_once(first, second):
    trials = trials_of(candidate(KNOBS[first] | KNOBS[second])[0], None, PLAIN[:3])
    found = explained(trials)
    assert f"{first} and {second}" in [e.name for e in found], found
    assert "; and " in found[0].words


def test_two_wrong_gradients_are_one_story():
    knobs = {"grads": lambda g, call: [g[0] * 3, -g[1], *g[2:]]}
    (found,) = explained(trials_of(*candidate(knobs), PLAIN[:3]))
    assert found.words == "dq is 3 times what it should be; dk is the negative of what it should be"


def test_a_conforming_trial_refutes():
    """Causal masking is missing in the one, and there in the other: that is no missing mask."""
    wrong = trials_of(candidate({"causal": lambda x, o: True})[0], None, PLAIN[1:2])
    right = trials_of(candidate({})[0], None, PLAIN[1:3])
    assert named(wrong)[0] == "causal_ignored"
    assert "causal_ignored" not in named(wrong + right)


def test_a_failure_that_the_mistake_does_not_touch_refutes():
    wrong = trials_of(candidate({"causal": lambda x, o: True})[0], None, PLAIN[1:2])
    other = trials_of(candidate({"lse": lambda lse, o: lse + 1.5})[0], None, PLAIN[3:4])
    assert explained(other + wrong) == ()


def test_nan_is_explained_by_nan_alone():
    def with_nan(y, o):
        y = y.copy()
        y[0, 0, 0] = np.nan
        return y

    assert explained(trials_of(candidate({"causal": lambda x, o: True, "out": with_nan})[0], None, PLAIN[1:2])) == ()
    knobs = {"out": lambda y, o: np.where(o.empty[..., None], np.nan, y)}
    assert "empty_row_nan" in named(trials_of(candidate(knobs)[0], None, PLAIN[:1]))


def test_nothing_to_explain():
    assert explain(ATTENTION, [], ARITHMETICS["float64"]) == ()

    def broken(q, k, v, **options):
        raise RuntimeError("no")

    assert explained(trials_of(broken, None, PLAIN[3:4])) == ()
    silent = trials_of(lambda *args, **options: None, None, PLAIN[3:4])
    assert explained(silent) == () and region(silent[0]) == "out: nothing came back"


def test_it_knows_scaled_dot_product():
    like = find("scaled_dot_product")
    rng = np.random.default_rng(0)
    calls = [Call(tuple(rng.normal(size=(*lead, 5, 3)) for _ in "qkv"), {}) for lead in ((2,), (2, 3))]
    found = named(trials_of(lambda q, k, v: like.forward(q, k, v, scale=1.0)[0], None, calls, like=like), like=like)
    assert found[0] == "scale_missing"


# --- other mechanisms ---------------------------------------------------------------------------------------------


def wrong_backward(mechanism, change, **options):
    """(forward, backward) of a mechanism, its gradients changed."""

    def backward(dout, *args):
        args = args[:-1]  # the last is the output
        _, saved = mechanism.forward(*args, **options)
        return change(*mechanism.backward(dout, saved))

    return lambda *args: mechanism.forward(*args, **options)[0], backward


def linear_calls():
    like = find("linear")
    calls = [like.example(RandomDraw(seed)) for seed in range(40)]
    calls = [c for c in calls if c.args[0].ndim == 2 and c.args[0].shape[0] > 1 and c.args[0].size > 3][:4]
    assert len(calls) == 4
    return like, calls


@pytest.mark.parametrize(
    "words, change",
    [
        ("dx is the negative of what it should be", lambda dx, dp: (-dx, dp)),
        ("dx is zero", lambda dx, dp: (0 * dx, dp)),
        ("dx is twice what it should be", lambda dx, dp: (2 * dx, dp)),
        ("dx is divided by the length of axis 0 of the output: averaged", lambda dx, dp: (dx / len(dx), dp)),
        ("dx is divided by the number of elements of the output: averaged", None),
        ("dx is shifted by one along axis 0", lambda dx, dp: (np.roll(dx, 1, 0), dp)),
        ("dx is 0.3 times what it should be", lambda dx, dp: (0.3 * dx, dp)),
    ],
)
def test_simple_changes_of_a_gradient(words, change):
    like, calls = linear_calls()
    size = lambda c: like.forward(*c.args, **c.options)[0].size  # noqa: E731
    sizes = iter([size(c) for c in calls])
    change = change or (lambda dx, dp: (dx / next(sizes), dp))
    forward, backward = wrong_backward(like, change)
    found = explained(trials_of(forward, backward, calls, like=like), like=like)
    assert [e.words for e in found] == [words]


@pytest.mark.parametrize("name, option, value", [("rotary", "pairing", "half"), ("group_norm", "groups", 1)])
def test_options_that_do_nothing_are_named(name, option, value):
    like = find(name)
    calls = [like.example(RandomDraw(seed)) for seed in range(12)]

    def forward(*args, **options):
        return like.forward(*args, **(options | {option: value}))[0]

    trials = trials_of(forward, None, calls, like=like)
    assert not all(t.conforms for t in trials)
    found = explained(trials, like=like)
    assert found[0].name == f"{option}={value!r}"
    assert found[0].words == f"answers as with {option}={value!r}, whatever is asked for"


def test_gradients_that_are_exchanged():
    like = find("scaled_dot_product")
    rng = np.random.default_rng(0)
    calls = [Call(tuple(rng.normal(size=(2, 5, 3)) for _ in "qkv"), {"scale": s}) for s in (0.4, 0.7)]

    def backward(dout, q, k, v, out, scale):
        dq, dk, dv = like.backward(dout, like.forward(q, k, v, scale=scale)[1])
        return dq, dv, dk

    def forward(*args, scale):
        return like.forward(*args, scale=scale)[0]

    found = explained(trials_of(forward, backward, calls, like=like), like=like)
    assert [e.words for e in found] == ["dk is what dv should be; dv is what dk should be"]


def test_gradients_of_one_item_alone():
    like, calls = linear_calls()

    def backward(dout, x, params, out):
        only = dout * (np.arange(len(dout)) == 0)[:, None]
        dx, _ = like.backward(dout, like.forward(x, params)[1])
        return dx, like.backward(only, like.forward(x, params)[1])[1]

    found = explained(trials_of(lambda *args: like.forward(*args)[0], backward, calls, like=like), like=like)
    assert len(found) == 1 and "that of the first item alone, not summed" in found[0].words


# --- where the error is -------------------------------------------------------------------------------------------

SHAPE = 2, 4, 130, 64


def place(name, shape=SHAPE, value=1.0, where=True, **wrong):
    """The words for an error of `value` at indices along axes a, b, c, d, and everywhere along those not given."""
    for axis, n in enumerate(shape):
        chosen = np.isin(np.arange(n), list(wrong.get("abcd"[axis], range(n))))
        where = where & chosen.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return words_for(name, where, value)


def words_for(name, where, value=1.0, lse=None):
    expected, got = {name: np.zeros(where.shape)}, {name: np.where(where, value, 0.0)}
    if lse is not None:
        expected["lse"] = lse
    bounds = {name: Bound(np.full(where.shape, 0.1))}
    trial = Trial(Call((0, 0, 0), {}), "", None, expected, bounds, got, (Verdict(name, BUG),), "", ())
    first, _, words = region(trial).partition(": ")
    assert first == name
    return words


@pytest.mark.parametrize(
    "words, name, wrong",
    [
        ("everywhere", "dq", {}),
        ("all items, head 1 of 4, keys 64 to 79 (a tile of 16), all columns", "dk", {"b": [1], "c": range(64, 80)}),
        ("item 0 of 2, head 1 of 4, all keys, all columns", "dk", {"a": [0], "b": [1]}),
        ("all items, all heads, rows 0 to 127 (the first tile of 128), all columns", "out", {"c": range(128)}),
        ("all items, all heads, the last 2 rows of 130 (the last tile of 128), all columns", "dq", {"c": [128, 129]}),
        ("all items, all heads, rows from 96 on, all columns", "out", {"c": range(96, 130)}),
        ("all items, all heads, the first 3 rows of 130, all columns", "out", {"c": range(3)}),
        ("all items, all heads, rows 5 to 24, all columns", "out", {"c": range(5, 25)}),
        ("all items, all heads, every 16th row from 5 on, all columns", "out", {"c": range(5, 130, 16)}),
        ("all items, all heads, every 22nd row to 88, all columns", "out", {"c": range(0, 100, 22)}),
        ("all items, all heads, row 7 of 130, all columns", "out", {"c": [7]}),
        ("all items, all heads, the last row of 130, all columns", "out", {"c": [129]}),
        ("all items, all heads, rows 1, 5, 6 of 130, all columns", "out", {"c": [1, 5, 6]}),
        ("all items, all heads, all rows, 5 of 64 columns, from 1 to 20", "out", {"d": [1, 5, 6, 9, 20]}),
        ("all items, all heads, tiles 1, 4 of 16 rows, all columns", "out", {"c": [*range(16, 32), *range(64, 80)]}),
        ("head 2 of 4", "dsinks", {"shape": (4,), "a": [2]}),
        ("all items, head 0 of 4, all rows", "lse", {"shape": (2, 4, 9), "b": [0]}),
        ("item 1 of 2, all rows, all columns", "out", {"shape": (2, 9, 5), "a": [1]}),
        ("all rows, column 3 of 5", "out", {"shape": (1, 1, 9, 5), "d": [3]}),
    ],
)
def test_region_of_indices(words, name, wrong):
    assert place(name, **wrong) == words


def test_region_of_sparse_and_of_special_values():
    where = np.zeros(SHAPE, bool)
    where[0, 0, 3, 4] = where[1, 2, 9, 11] = True
    text = place("dv", where=where)
    assert text == "all items, heads 0, 2 of 4, keys 3, 9 of 130, columns 4, 11 of 64 (2 of 16 elements there)"
    assert place("dv", b=[1], value=np.nan) == "NaN, all items, head 1 of 4, all keys, all columns"
    assert place("dv", value=np.inf) == "infinite, everywhere"
    where = np.where(np.arange(64) < 3, np.nan, 2.0) + np.zeros(SHAPE)
    assert place("dv", value=where).startswith("NaN and wrong numbers, everywhere")


def test_region_of_scores():
    i, j = np.arange(6)[:, None], np.arange(8)
    sides = {"on": j == i, "just above": j == i + 1, "just below": j == i - 1, "above": j > i, "below": j < i}
    for words, where in sides.items():
        found = words_for("dattn_bias", np.broadcast_to(where, (2, 3, 6, 8)))
        assert found == f"all items, all heads, {words} the diagonal"
    assert words_for("dattn_bias", np.broadcast_to(j == 2, (6, 8))) == "all queries, key 2 of 8"


def test_region_of_rows_without_keys():
    lse = np.zeros((2, 4, 9))
    lse[:, 1, 2:4] = -np.inf
    where = np.broadcast_to(np.isneginf(lse)[..., None], (2, 4, 9, 5))
    assert words_for("out", where, np.nan, lse) == "NaN, all items, head 1 of 4, only rows without a key, all columns"
    where = where.copy()
    where[0, 0, 0, 0] = True
    assert "without a key" not in words_for("out", where, np.nan, lse)


def test_region_of_other_mechanisms_and_of_arrays_together():
    like, calls = linear_calls()
    forward, backward = wrong_backward(like, lambda dx, dp: (dx * (np.arange(len(dx)) == 1)[:, None], dp))
    assert "dx: zero" in region(trials_of(forward, backward, calls, like=like)[0])
    knobs = {"grads": lambda g, call: [g[0], -g[1], -g[2], *g[3:]]}
    assert region(trials_of(*candidate(knobs), PLAIN[4:])[0]) == "dk, dv: everywhere"


def test_calls_whose_arrays_are_of_several_ranks():
    """What one call shows along its third axis, another without a third axis does not contradict with an error."""
    values, allowed = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
    trial = SimpleNamespace(case=SimpleNamespace(values={"out": values}), allowed={"out": allowed})
    for words, move in _MOVES.items():
        same, as_allowed = _moved("out", move, 2)(trial)
        assert same is values and as_allowed is allowed, words
        assert not np.array_equal(_moved("out", move, 0)(trial)[0], values), words
