"""Bounds in closed form: no right kernel is outside, small mistakes are, and they are attained where they can be."""

import mpmath
import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention
from refattn.attention.dot_product.dot_product_attention import Convention, Out
from refattn.core import Call
from refattn.oracle import attention_part
from refattn.oracle.arithmetic import ARITHMETICS, BFLOAT16, FLOAT16, FLOAT32, FORMATS, half_ulp, ladder, round_to
from refattn.oracle.bounds import GRADIENTS, attention_bounds, exact, outside_the_model, reference
from refattn.oracle.statistical import LAMBDA
from tests import emulated

SINGLE, DOUBLE = ARITHMETICS["float32"], ARITHMETICS["float64"]
LENGTHS = 1, 3, 15, 16, 17, 33, 64, 65, 100, 128, 129


def drawn(seed, a, *, options=True):
    """A call of odd sizes with many options, and a cotangent; every fifth seed has another kind of numbers."""
    rng = np.random.default_rng([seed, 7])
    shared, items = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    heads = shared * int(rng.integers(1, 3))
    queries, keys = (int(n) for n in rng.choice(LENGTHS, 2))
    features, wide = (int(n) for n in rng.choice([4, 16, 32, 64], 2))
    size = {1: 3.0, 2: 0.02}.get(seed % 5, 1.0)
    q, k = (
        size * rng.normal(size=(items, heads, queries, features)),
        size * rng.normal(size=(items, shared, keys, features)),
    )
    v = rng.normal(size=(items, shared, keys, wide))
    if seed % 5 == 3:
        v = 0.1 * v + 5
    if seed % 5 == 4:
        q[..., 0] *= 8
        k[..., 0] *= 8
        v[..., 0] *= 20
    full, some = (items, heads, queries, keys), {}
    if options:
        some |= {"is_causal": True, "q_offset": "bottom_right"} if rng.random() < 0.4 else {}
        some |= {"window": (int(rng.integers(20)), int(rng.integers(20)))} if rng.random() < 0.3 else {}
        some |= {"softcap": 2.0} if rng.random() < 0.3 else {}
        some |= {"attn_mask": rng.random(full) < 0.7} if rng.random() < 0.3 else {}
        some |= {"kv_seqlens": rng.integers(0, keys + 1, items)} if rng.random() < 0.2 else {}
        some |= {"dropout_keep": rng.random(full) < 0.8, "dropout_p": 0.2} if rng.random() < 0.3 else {}
    bias, sinks = None, None
    if options and rng.random() < 0.4:
        bias = rng.normal(size=[full, (1, *full[1:]), (1, 1, 1, keys), (1, heads, 1, 1)][rng.integers(4)])
    if options and rng.random() < 0.3:
        sinks = rng.normal(size=heads)
    args = tuple(None if x is None else round_to(x, a.inputs) for x in (q, k, v, bias, sinks))
    return Call(args, some), round_to(rng.normal(size=(items, heads, queries, wide)), a.out)


def results(a, algorithm, call, dout, **sizes):
    """{name: array} of an emulated kernel, in the arithmetic."""
    forward, backward = emulated.kernel(a, algorithm, **sizes)
    dtype = np.float64 if a.out.precision > 24 else np.float32
    args = [None if x is None else x.astype(dtype) for x in call.args]
    out, lse = forward(*args, **call.options)
    grads = backward(dout.astype(dtype), *args, out, lse, **call.options)
    found = {"out": out, "lse": lse} | {n: g for n, g in zip(GRADIENTS, grads) if g is not None}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def ratios(found, values, bounds, tier):
    """The largest error over bound of each array; inf where NaN or inf are not where the reference has them."""
    with np.errstate(all="ignore"):
        most = {}
        for name, value in values.items():
            same = (found[name] == value) | (np.isnan(found[name]) & np.isnan(value))
            ratio = np.where(same, 0, np.abs(found[name] - value) / getattr(bounds[name], tier))
            most[name] = np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0)
    return most


@pytest.mark.parametrize("algorithm", ["naive", "flash", "splitk"])
@pytest.mark.parametrize(
    "name", [n for n in ARITHMETICS if not n.startswith(("jax_cpu_f", "onnxruntime", "torch_cpu_f"))]
)
def test_no_right_kernel_is_outside(name, algorithm):
    a = ARITHMETICS[name]._replace(splits=4 if algorithm == "splitk" else 1)
    for seed in range(15):
        call, dout = drawn(seed, a)
        values = reference(call, dout)
        bounds = attention_bounds(call, dout, a, values=values)
        found = results(a, algorithm, call, dout)
        for tier in ("worst", "stat"):
            most = ratios(found, values, bounds, tier)
            assert max(most.values()) <= 1, f"{name} {algorithm}, seed {seed}, {tier}: {most}"


@pytest.mark.parametrize("name", ["bf16_upcast", "f16_upcast"])
def test_the_bound_is_attained(name):
    """Where everything inside is in float32, rounding what is stored is nearly all; no bound can be smaller."""
    a, largest = ARITHMETICS[name], {}
    for seed in range(25):
        call, dout = drawn(seed, a)
        values = reference(call, dout)
        most = ratios(results(a, "flash", call, dout), values, attention_bounds(call, dout, a, values=values), "worst")
        largest = {n: max(r, largest.get(n, 0)) for n, r in most.items()}
    assert all(largest[n] > 0.9 for n in ("out", "dq", "dk", "dv")), largest


def test_what_chance_makes_of_it_is_far_below_the_worst_case():
    call, dout = drawn(0, SINGLE, options=False)
    call = call._replace(args=tuple(np.random.default_rng(i).normal(size=(1, 2, 256, 64)) for i in range(3)))
    dout = np.random.default_rng(3).normal(size=(1, 2, 256, 64))
    bounds = attention_bounds(call, dout, SINGLE)
    for name in ("out", "dq", "dk", "dv"):
        assert (bounds[name].stat <= bounds[name].worst).all()
        assert 4 < np.median(bounds[name].worst / bounds[name].stat) < 500, name
    found = results(SINGLE, "flash", call, dout)
    values = reference(call, dout)
    for name in ("out", "dq", "dk", "dv"):
        mean_square = np.mean(((found[name] - values[name]) / bounds[name].sd) ** 2)
        assert 0.02 < mean_square < 1, f"{name}: {mean_square}"


@pytest.mark.parametrize("name", ["float32", "bf16_flash", "f16_eager"])
def test_a_small_mistake_is_outside(name):
    """Of the inverse scale, of one row, of one key: a few times what is stored."""
    a = ARITHMETICS[name]
    rng = np.random.default_rng(0)
    call = Call(tuple(round_to(rng.normal(size=(1, 1, 200, 32)), a.inputs) for _ in range(3)), {})
    values = reference(call)
    bounds = attention_bounds(call, None, a, values=values)
    by = {"float32": 1e-4, "bf16_flash": 0.02, "f16_eager": 0.1}[name]
    scaled = reference(call._replace(options={"scale": (1 + by) / np.sqrt(32)}))
    shifted = reference(call._replace(args=(*call.args[:2], np.roll(call.args[2], 1, axis=2))))
    dropped = reference(call._replace(options={"kv_seqlens": np.array([199])}))
    for wrong in (scaled, shifted, dropped):
        assert max(ratios(wrong, values, bounds, "worst").values()) > 1


def test_a_promise_that_is_not_kept_is_seen():
    """Of float32 with operands of TF32, of float32 sums kept in bfloat16: outside; and inside what they are."""
    for seed in range(5):
        call, dout = drawn(5 * seed, SINGLE)
        values = reference(call, dout)
        for coarse in (ARITHMETICS["tf32"], SINGLE._replace(partial=BFLOAT16, partial_queries=16, partial_keys=16)):
            found = results(coarse, "flash", call, dout)
            promised = attention_bounds(call, dout, SINGLE, values=values)
            admitted = attention_bounds(call, dout, coarse, values=values)
            assert max(ratios(found, values, admitted, "worst").values()) <= 1
            if call.args[1].shape[2] > 3:
                assert max(ratios(found, values, promised, "worst").values()) > 1


def test_a_shorter_chain_allows_less():
    call, dout = drawn(0, SINGLE, options=False)
    call = call._replace(args=tuple(np.random.default_rng(i).normal(size=(1, 1, 400, 64)) for i in range(3)))
    dout = np.random.default_rng(3).normal(size=(1, 1, 400, 64))
    long, short = (attention_bounds(call, dout, SINGLE._replace(chain=n)) for n in (None, 16))
    for name in ("out", "dq", "dk", "dv"):
        assert (short[name].worst <= long[name].worst).all() and short[name].worst.mean() < 0.7 * long[
            name
        ].worst.mean()


def test_what_is_hidden_is_exact():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 2, 6, 4)) for _ in range(3))
    call = Call((q, k, v), {"kv_seqlens": np.array([4])})
    bounds = attention_bounds(call, rng.normal(size=q.shape), SINGLE)
    tiny = 1e-35  # the smallest normal number, a few times
    assert (bounds["dk"].worst[:, :, 4:] < tiny).all() and (bounds["dv"].worst[:, :, 4:] < tiny).all()
    assert (bounds["dk"].worst[:, :, :4] > 1e-9).all()
    nothing = attention_bounds(call._replace(options={"kv_seqlens": np.array([0])}), None, SINGLE)
    assert (nothing["out"].worst == 0).all() and (nothing["lse"].worst == 0).all()


def test_poison_behind_a_mask_does_not_reach_the_bounds():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(1, 2, 6, 4)) for _ in range(4))
    options = {"kv_seqlens": np.array([4]), "convention": Convention(masked_values="skip")}
    clean = attention_bounds(Call((q, k, v), options), dout, SINGLE)
    for x in (k, v):
        x[:, :, 4] = np.nan
        x[:, :, 5] = np.inf
    poisoned = attention_bounds(Call((q, k, v), options), dout, SINGLE)
    for name in ("out", "lse", "dq"):
        assert np.isfinite(poisoned[name].stat).all()
        assert np.allclose(poisoned[name].worst, clean[name].worst, rtol=0.5), name


def test_huge_numbers_are_bounded_in_double_precision():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, 6, 4)) for _ in range(3))
    bounds = attention_bounds(Call((q, k, 1e30 * v), {}), None, SINGLE)
    plain = attention_bounds(Call((q, k, v), {}), None, SINGLE)
    assert np.allclose(bounds["out"].worst, 1e30 * plain["out"].worst, rtol=0.1)
    assert attention_part.LARGE < 1e30


def test_parts_make_no_difference(monkeypatch):
    call, dout = drawn(6, SINGLE)
    whole = attention_bounds(call, dout, SINGLE)
    monkeypatch.setattr(attention_part, "ELEMENTS", 64)
    cut = attention_bounds(call, dout, SINGLE)
    for name, bound in whole.items():
        for one, other in zip(bound, cut[name]):
            assert np.allclose(one, other, rtol=1e-2), name


def test_the_gradient_of_lse_joins():
    """Into what is computed: with a cotangent of lse, the bounds are those of a larger ds."""
    call, dout = drawn(5, SINGLE)
    dlse = 10 * np.random.default_rng(1).normal(size=dout.shape[:3])
    without, joined = (attention_bounds(call, d, SINGLE, ("worst",)) for d in (dout, Out(dout, dlse)))
    assert joined["dq"].worst.mean() > 2 * without["dq"].worst.mean()
    assert np.allclose(joined["dv"].worst, without["dv"].worst, rtol=1e-3)


def test_overflow_is_outside_the_model():
    a = ARITHMETICS["f16_eager"]
    q = np.full((1, 1, 2, 64), 40.0)
    call = Call((q, q, q), {})
    assert outside_the_model(call, reference(call), a) == "scores of up to 1.02e+05 may overflow float16"
    assert outside_the_model(call, reference(call), ARITHMETICS["f16_flash"]) == ""
    big = Call((q / 40, q / 40, 1e6 * q), {})
    assert outside_the_model(big, reference(big), ARITHMETICS["f16_flash"]) == "out of up to 4e+07 overflows float16"


def test_the_reference_is_mathematics():
    """softmax_precision and a mask value that swallows its logit are arithmetic, not mathematics."""
    a = exact(Convention(softmax_precision="float16", mask_op="add", mask_value="lowest"))
    assert a.softmax_precision is None and a.mask_op == "replace" and a.mask_value == np.finfo(np.float32).min
    assert exact(None) == Convention() and exact(Convention(mask_op="add")).mask_op == "add"


# --- the reference's own error ---------------------------------------------------------------------------------

SATURATED = {"logits of 16": (4, 0), "logits of 256": (16, 0), "logits of 1000": (32, 0), "values of 10000": (1, 1e4)}


def exactly(q, k, v, dout):
    """dq and dk to 900 digits, as numbers: in saturated rows 50 are not enough."""
    with mpmath.workdps(900):
        scale = 1 / mpmath.sqrt(q.shape[-1])
        q, k, v, dout = (mpmath.matrix(x.tolist()) for x in (q, k, v, dout))
        s, dp = scale * (q * k.T), dout * v.T
        ds = mpmath.matrix(s.rows, s.cols)
        for i in range(s.rows):
            e = [mpmath.exp(s[i, j]) for j in range(s.cols)]
            p = [x / mpmath.fsum(e) for x in e]
            d = mpmath.fsum(p[j] * dp[i, j] for j in range(s.cols))
            for j in range(s.cols):
                ds[i, j] = scale * p[j] * (dp[i, j] - d)
        return tuple(np.array([[float(x) for x in row] for row in m.tolist()]) for m in (ds * k, ds.T * q))


@pytest.mark.parametrize("kind", SATURATED)
def test_saturated_rows_keep_their_digits(kind):
    """Row by row, relative to the row: without centring the first is 1e-10, and those of 256 and 1000 are all wrong."""
    size, offset = SATURATED[kind]
    rng = np.random.default_rng(0)
    q, k, v, dout = size * rng.normal(size=(4, 16)), size * rng.normal(size=(24, 16)), *rng.normal(size=(2, 24, 16))
    v, dout = v + offset, dout[:4]
    exact_dq, exact_dk = exactly(q, k, v, dout)
    _, saved = dot_product_attention.forward(*(x[None, None] for x in (q, k, v)))
    dq, dk, *_ = dot_product_attention.backward(dout[None, None], saved)
    error = np.abs(dq[0, 0] - exact_dq).max(axis=-1) / np.abs(exact_dq).max(axis=-1)
    assert (error < 1e-12).all(), error
    assert np.abs(dk[0, 0] - exact_dk).max() < 1e-12 * np.abs(exact_dk).max()
    bounds = attention_bounds(Call(tuple(x[None, None] for x in (q, k, v)), {}), dout[None, None], DOUBLE, ("worst",))
    assert (np.abs(dq[0, 0] - exact_dq) <= bounds["dq"].worst[0, 0]).all()
    assert (np.abs(dk[0, 0] - exact_dk) <= bounds["dk"].worst[0, 0]).all()


# --- formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_rounding_is_that_of_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    x = rng.normal(size=20000) * 2.0 ** rng.uniform(-160, 140, 20000)
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, np.nan], np.arange(-40, 40) / 16, 2.0 ** np.arange(-30, 20)])
    dtype = getattr(ml_dtypes, name, None) or np.dtype(name)
    with np.errstate(over="ignore"):
        theirs = x.astype(dtype).astype(np.float64)
    ours = round_to(x, FORMATS[name])
    overflows = np.isinf(ours) & np.isnan(theirs)  # e4m3fn has no infinity
    assert np.array_equal(ours[~overflows], theirs[~overflows], equal_nan=True)
    assert overflows.any() == (name == "float8_e4m3fn")


def test_truncation_goes_toward_zero():
    x = np.random.default_rng(0).normal(size=1000)
    x = np.append(x, [np.inf, -np.inf, 1e6])
    cut = round_to(x, FLOAT16, truncate=True)
    assert (np.abs(cut) <= np.abs(x)).all() and (np.abs(x[:-3] - cut[:-3]) < 2 * half_ulp(x[:-3], FLOAT16)).all()
    assert cut[-3] == np.inf and cut[-1] == 65504


@pytest.mark.parametrize("form", [FLOAT32, FLOAT16])
def test_half_a_unit_in_the_last_place(form):
    x = np.abs(np.random.default_rng(0).normal(size=100)).astype(form.name)
    assert np.array_equal(
        half_ulp(x.astype(float), form), (np.nextafter(x, x.dtype.type(np.inf)) - x).astype(float) / 2
    )
    assert half_ulp(0.0, form) == form.eta and form.u == np.finfo(form.name).eps / 2


def test_a_ladder_goes_down():
    call, dout = drawn(0, SINGLE)
    values = reference(call, dout)
    promised = attention_bounds(call, dout, SINGLE, ("worst",), values)
    for words, coarse in ladder(SINGLE):
        admitted = attention_bounds(call, dout, coarse, ("worst",), values)
        assert all((admitted[n].worst >= promised[n].worst).all() for n in values), words
        assert any(admitted[n].worst.mean() > 1.01 * promised[n].worst.mean() for n in values), words


def test_errors_of_a_row_add_up_in_a_bias_that_is_stretched_over_keys():
    """D and lse are off by one number a row: over the keys that does not cancel."""
    a, largest = ARITHMETICS["bf16_upcast"], 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        q, k = rng.normal(size=(2, 1, 2, 72, 32))
        v, dout = 4 + rng.normal(size=(1, 2, 72, 32)), 1 + rng.normal(size=(1, 2, 72, 32))
        args = tuple(round_to(x, a.inputs) for x in (q, k, v, rng.normal(size=(1, 1, 72, 1))))
        call, dout = Call((*args, None), {"softcap": 3.0}), round_to(dout, a.out)
        values = reference(call, dout)
        bounds = attention_bounds(call, dout, a, values=values)
        found = ratios(results(a, "flash", call, dout), values, bounds, "stat")
        largest = max(largest, found["dattn_bias"])
    assert 0.05 < largest <= 1


def one_row(logit, sink, v=1.0, dout=1.0):
    """One query, one key, a sink: (call, dout)."""
    args = (np.full((1, 1, 1, 1), float(x)) for x in (logit, 1, v))
    return Call((*args, None, np.array([float(sink)])), {"scale": 1.0}), np.full((1, 1, 1, 1), float(dout))


def test_a_key_that_weighs_next_to_nothing_beside_a_sink_has_its_error_all_the_same():
    """Half a unit in the last place of its exponent, -67, is 64 u of what it weighs."""
    call, _ = one_row(-67, 0.25)
    values = reference(call)
    (y,) = values["out"].ravel()
    assert 1e-31 < y < 1e-29
    assert attention_bounds(call, None, SINGLE, ("worst",), values)["out"].worst.item() >= 64 * FLOAT32.u * y


@pytest.mark.parametrize("size", [1e-15, 1e-19, 1e-22, 1e-28])
def test_values_whose_squares_vanish_have_their_errors_all_the_same(size):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, 9, 8)) for _ in range(3))
    whole = attention_bounds(Call((q, k, v), {}), None, SINGLE, ("worst",))["out"].worst
    small = attention_bounds(Call((q, k, v * size), {}), None, SINGLE, ("worst",))["out"].worst
    assert (small >= 0.98 * size * whole).all() and (small <= 3 * size * whole + 1e-35).all()


def test_what_underflow_takes_of_a_sink_is_allowed():
    call, dout = one_row(90.25, 0, v=913)
    values = reference(call, dout)
    (expected,) = np.abs(values["dsinks"])
    assert 1e-37 < expected < 1e-36, "D times a weight that float32 has as a subnormal number only"
    for tier in ("worst", "stat"):
        allowed = getattr(attention_bounds(call, dout, SINGLE._replace(flush=True), values=values)["dsinks"], tier)
        assert allowed.item() >= expected, f"0 is right where what is subnormal is flushed: {tier}"


def test_a_sink_that_is_a_column_of_probabilities_is_rounded_as_they_are():
    """By hand: p of the sink in float16, exact everything else."""
    eager = ARITHMETICS["f16_eager"]
    assert eager.probs_in_dscores
    for sink in (-1.0, -3.7, -9.1, -12.3):
        call, dout = one_row(0, sink, v=700, dout=3)
        values = reference(call, dout)
        p = 1 / (1 + np.exp(-sink))
        found = -round_to(np.array(p), FLOAT16) * 700 * (1 - p) * 3
        assert np.isclose(values["dsinks"], -p * 700 * (1 - p) * 3, rtol=1e-12)
        bound = attention_bounds(call, dout, eager, values=values)["dsinks"]
        for allowed in (bound.worst, bound.stat):
            assert abs(found - values["dsinks"]) <= allowed and np.isfinite(allowed)
            assert allowed <= 0.02 * abs(values["dsinks"]) + 700 * 3 * 2**-22, "and not much more"


def test_a_sink_that_is_a_column_of_ds_is_rounded_once_more():
    """For each of many queries, whose gradients cancel."""
    n, stored = 400, ARITHMETICS["bf16_eager"]
    call, dout = one_row(0, -1.0, v=700, dout=3)
    each = BFLOAT16.u * np.abs(reference(call, dout)["dsinks"])
    many = call._replace(args=(np.zeros((1, 1, n, 1)), *call.args[1:]))
    douts = 3.0 * (-1) ** np.arange(n).reshape(1, 1, n, 1)
    once, less = (attention_bounds(many, douts, a)["dsinks"] for a in (stored, stored._replace(dscores=None)))
    assert once.worst - less.worst >= 0.99 * n * each
    assert once.stat * once.stat - less.stat * less.stat >= 0.99 * n * (LAMBDA * each) ** 2 / 3


def test_where_ds_is_scaled_before_it_is_rounded_underflow_takes_more():
    rng = np.random.default_rng(2)
    q, k, v, dout = (size * rng.normal(size=(1, 1, 8, 64)) for size in (1e-3, 30, 1e-3, 1e-3))
    call, after = Call((q, k, v), {}), ARITHMETICS["f16_eager"]
    before = after._replace(scaled_dscores=True)
    found = {a.scaled_dscores: attention_bounds(call, dout, a) for a in (after, before)}
    for tier in ("worst", "stat"):
        ratio = getattr(found[True]["dq"], tier) / getattr(found[False]["dq"], tier)
        assert (ratio > 2).all() and (ratio <= 8.01).all(), "at most one over the scale"
        assert (getattr(found[True]["dv"], tier) == getattr(found[False]["dv"], tier)).all()


def test_where_a_logit_is_not_known_at_all_chance_says_nothing():
    """Scores near -2e4 in float16 are 16 apart: two keys weigh anything from 0 to 1 each."""
    v = np.array([0.4, 0.4058]).reshape(1, 1, 2, 1)
    k = np.array([-19993.0, -20009.0]).reshape(1, 1, 2, 1)
    call = Call((np.ones((1, 1, 1, 1)), k, v), {"scale": 1.0})
    bound = attention_bounds(call, None, ARITHMETICS["f16_eager"], values=reference(call))["out"]
    assert bound.stat.item() == bound.worst.item() >= 0.0058
