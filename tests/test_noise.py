"""The allowed error: no right answer is accused, and small mistakes are seen."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

from refattn.attention.channel import squeeze_excitation
from refattn.attention.dot_product import multi_head, scaled_dot_product
from refattn.core import Call, leaves, tree_map
from refattn.draw import RandomDraw
from refattn.oracle import noise
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.oracle.check import check
from refattn.oracle.compare import Bound
from refattn.oracle.inputs import rounded
from refattn.oracle.noise import noise_bounds, noise_bounds_of_call
from refattn.primitives import batch_norm, conv, gru_cell, linear, softmax
from refattn.registry import everything

U32 = 2.0**-24
SINGLE = ARITHMETICS["float32"]


def allowed(value, expected, seed=0):
    """The statistical bound of one array."""
    bound, _ = noise_bounds(lambda noisy: (value(noisy), None), (expected, None), SINGLE, seed)
    return bound.stat


def allowed_of_call(mechanism, call, dout, expected, arithmetic=SINGLE, seed=0):
    """Of (out, gradients), in their structure."""
    bounds = noise_bounds_of_call(mechanism, call, dout, expected, arithmetic, seed)
    return tuple(map(stats, bounds))


def stats(tree):
    if isinstance(tree, Bound):
        return tree.stat
    if isinstance(tree, tuple):
        children = map(stats, tree)
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return tree


def pair(module):
    """The mechanism itself as a candidate: (forward, backward) as a candidate has them."""

    def forward(*args, **options):
        return module.forward(*args, **options)[0]

    def backward(dout, *args_and_out, **options):
        return module.backward(dout, module.forward(*args_and_out[:-1], **options)[1])

    return forward, backward


# --- nobody is accused wrongly -------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", list(everything().values()), ids=str)
def test_every_mechanism_conforms_to_itself_in_single_precision(mechanism):
    forward, backward = pair(mechanism.module)
    report = check(forward, mechanism, backward=backward, max_examples=3, seed=3)
    assert report.ok, str(report)
    assert report.gradients == "judged" and not report.passed_over


@pytest.mark.parametrize("n", [1, 3, 30, 300, 3000])
@pytest.mark.parametrize("offset", [0, 5])
def test_a_sum_in_single_precision(n, offset):
    """One term after the other, the worst order; and the bound is no wild guess."""
    ratios = []
    for seed in range(10):
        x = (np.random.default_rng(seed).normal(size=n) + offset).astype(np.float32)
        computed, exact = np.float32(0), x.sum(dtype=np.float64)
        for term in x:
            computed += term
        most = allowed(lambda noisy, x=x: noisy(x.astype(float)).sum(), np.asarray(exact), seed)
        assert abs(computed - exact) <= most
        assert U32 * abs(exact) < most < 100 * U32 * np.sqrt(n) * np.abs(x).sum()
        ratios.append(abs(computed - exact) / most)
    assert n < 30 or max(ratios) > 0.01


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b.T,
        lambda a, b: np.einsum("ik,jk->ij", a, b),
        lambda a, b: np.einsum("...k,jk->...j", a, b),
        lambda a, b: np.dot(a, b.T),
        lambda a, b: np.inner(a, b),
        lambda a, b: np.tensordot(a, b, ([1], [1])),
        lambda a, b: np.tensordot(a, b.T, 1),
        lambda a, b: (a[:, None] * b).sum(axis=-1),
        lambda a, b: np.add.reduce(a[:, None] * b, axis=-1),
        lambda a, b: np.cumsum(a[:, None] * b, axis=-1)[..., -1],
        lambda a, b: b.shape[1] * (a[:, None] * b).mean(axis=-1),
    ],
)
def test_every_way_to_multiply_is_noisy_alike(product):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 50)), rng.normal(size=(7, 50))
    most = allowed(lambda noisy: product(noisy(a), noisy(b)), a @ b.T)
    plain = allowed(lambda noisy: noisy(a) @ noisy(b).T, a @ b.T)
    ratio = most / plain
    assert np.median(ratio) < 2 and np.median(ratio) > 0.5 and ratio.max() < 4 and ratio.min() > 0.25


def test_what_is_gathered_is_noisy():
    values, where = np.random.default_rng(0).normal(size=500), np.arange(500) % 5

    def gather(noisy):
        sums = np.zeros(5)
        np.add.at(sums, where, noisy(values))
        return sums

    def column_sums(noisy):
        return noisy(values.reshape(100, 5)).sum(axis=0)

    exact = values.reshape(100, 5).sum(axis=0)
    ratio = allowed(gather, exact) / allowed(column_sums, exact)
    assert ratio.max() < 2 and ratio.min() > 0.5


def test_what_is_written_in_place_forgets_the_sum_it_was():
    """np.mean divides its sum in place; an assignment replaces what was computed."""
    x = np.random.default_rng(0).normal(size=(4, 100)) + 1
    mean = allowed(lambda noisy: noisy(x).mean(axis=1) * 1.0, x.mean(axis=1))
    assert (mean < 1e-4).all()

    def overwritten(noisy):
        y = noisy(x) @ np.ones(100)
        y[:2] = 0
        return y + 0.0

    total = x.sum(axis=1) * np.array([0, 0, 1, 1])
    most = allowed(overwritten, total)
    assert (most[:2] == 0).all() and (most[2:] > 0).all()


@pytest.mark.parametrize("mechanism", list(everything().values()), ids=str)
def test_noise_is_never_lost(mechanism):
    """An array made by np.empty, say, in place of np.empty_like, would compute without noise from there on."""
    for seed in range(4):
        call = mechanism.example(RandomDraw(seed))
        start = noise.Noise(np.random.default_rng(seed), 1e-7, 1e-7, 1e-38, afresh=bool(seed % 2)).start
        args, options = rounded(call, np.float64)
        options = {name: tree_map(start, value) for name, value in options.items()}
        out, saved = mechanism.forward(*tree_map(start, args), **options)
        grads = mechanism.backward(tree_map(start, tree_map(lambda y: np.ones(y.shape), out)), saved)
        plain = [path for path, x in leaves((out, tuple(grads))) if not isinstance(x, noise.Noisy)]
        assert not plain, f"{mechanism}: computed without noise: {plain}"


def test_a_gradient_that_is_zero_by_cancellation_may_be_noise():
    """The bias of the keys moves every score of a row alike: its gradient is 0, and rounding in anybody's kernel."""
    draw = RandomDraw(0)
    q, k, v = draw.array(2, 5, 8), draw.array(2, 7, 8), draw.array(2, 7, 8)
    call = Call((q, k, v, draw.like(multi_head.init(draw.rng, 8))), {"heads": 2})
    out, saved = multi_head.forward(*call.args, **call.options)
    dout = draw.array(*out.shape)
    grads = multi_head.backward(dout, saved)
    _, most = allowed_of_call(multi_head, call, dout, (out, grads))
    assert np.abs(grads[3].k.bias).max() < 1e-13
    assert (most[3].k.bias > U32 * np.abs(grads[3].k.weight).max() / 10).all()


def test_what_is_masked_must_be_exactly_zero():
    draw = RandomDraw(1)
    mask = np.ones((1, 3, 4), bool)
    mask[:, :, 2] = False
    call = Call((draw.array(1, 3, 2), draw.array(1, 4, 2), draw.array(1, 4, 2)), {"mask": mask})
    out, saved = scaled_dot_product.forward(*call.args, **call.options)
    dout = draw.array(*out.shape)
    _, (dq, dk, dv) = allowed_of_call(
        scaled_dot_product, call, dout, (out, scaled_dot_product.backward(dout, saved))
    )
    assert (dk[:, 2] == 0).all() and (dv[:, 2] == 0).all()
    assert (dk[:, [0, 1, 3]] > 0).all() and (dq > 0).all()


def test_a_kink_that_rounding_may_step_over_is_not_judged_and_others_are():
    """relu'(0+): the candidate may have 0 or 1 where its sum cancels to a rounding error."""
    x = np.array([[1e-7, 1.0], [0.5, 1.0]])

    def gradient(noisy):
        shifted = (noisy(x) + 1.0) - 1.0
        return (shifted > 0) * np.ones_like(x)

    most = allowed(gradient, np.ones((2, 2)))
    assert most[0, 0] > 1 and most[1, 0] < 1e-5 and most[0, 1] < 1e-5


def test_underflow_is_allowed():
    x = np.array([-90.0, -1.0])
    most = allowed(lambda noisy: np.exp(noisy(x)), np.exp(x))
    assert most[0] >= np.exp(-90.0) and most[1] < 1e-4


def test_the_same_seed_allows_the_same():
    x = np.random.default_rng(0).normal(size=(3, 4))
    one, same, other = (
        allowed(lambda noisy: np.exp(noisy(x)).sum(axis=1), np.exp(x).sum(axis=1), seed)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_half_precision_allows_more_and_double_less():
    call = squeeze_excitation.example(RandomDraw(2))
    out = squeeze_excitation.forward(*call.args)[0]
    half, single, double = (
        allowed_of_call(squeeze_excitation, call, None, (out, None), ARITHMETICS[name])[0].mean()
        for name in ("f16_eager", "float32", "float64")
    )
    assert 2**12 < half / single < 2**14 and 2**28 < single / double < 2**30


def test_the_inputs_are_left_alone():
    call = linear.example(RandomDraw(0))
    before = tree_map(np.copy, call.args)
    out, saved = linear.forward(*call.args)
    dout = np.ones_like(out)
    allowed_of_call(linear, call, dout, (out, linear.backward(dout, saved)))
    for (_, a), (_, b) in zip(leaves(before), leaves(call.args)):
        assert np.array_equal(a, b) and type(b) is np.ndarray


# --- mistakes are seen ---------------------------------------------------------------------------------------


def attention(q, k, v, *, mask=None, is_causal=False, **mistake):
    """A candidate that makes one mistake, or none."""
    right = {"scale": 1.0, "power": 0.5, "causal": 0, "values": lambda v: v, "drop": 0, "masked": True}
    m = SimpleNamespace(**right | mistake)
    s = q @ np.swapaxes(k, -1, -2) * q.dtype.type(m.scale * q.shape[-1] ** -m.power)
    allowed = np.ones(s.shape, bool) if mask is None or not m.masked else mask
    if is_causal:
        allowed = allowed & np.tri(*s.shape[-2:], m.causal, dtype=bool)
    if m.drop and s.shape[-1] > 1:
        allowed = allowed & (np.arange(s.shape[-1]) < s.shape[-1] - m.drop)
    top = np.where(allowed, s, -np.inf).max(axis=-1, keepdims=True)
    e = np.where(allowed, np.exp(np.where(allowed, s - np.where(np.isinf(top), 0, top), 0)), 0)
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total) @ m.values(v)


def truncated(bits):
    """Operands cut to fewer bits, as a tensor core does."""

    def cut(x):
        return (x.view(np.uint32) & np.uint32(0xFFFFFFFF << (23 - bits) & 0xFFFFFFFF)).view(np.float32)

    return cut


MISTAKES = {
    "scale missing": {"power": 0.0},
    "scale squared": {"power": 1.0},
    "scale off by 1e-4": {"scale": 1 + 1e-4},
    "scale off by 1e-5": {"scale": 1 + 1e-5},
    "sees one token ahead": {"causal": 1},
    "does not see itself": {"causal": -1},
    "last key dropped": {"drop": 1},
    "mask ignored": {"masked": False},
    "values shifted by one": {"values": lambda v: np.roll(v, 1, axis=-2)},
    "values in bfloat16": {"values": truncated(7)},
    "values in TF32": {"values": truncated(10)},
    "values cut to 16 bits": {"values": truncated(15)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_attention_are_found(mistake):
    def candidate(q, k, v, *, mask=None, is_causal=False):
        return attention(q, k, v, mask=mask, is_causal=is_causal, **MISTAKES[mistake])

    report = check(candidate, "scaled_dot_product", max_examples=16)
    assert not report.ok and report.verdicts["out"].ratio > 1.5, str(report)


def test_attention_without_a_mistake_is_not_accused():
    def candidate(q, k, v, *, mask=None, is_causal=False):
        return attention(q, k, v, mask=mask, is_causal=is_causal)

    for seed in range(4):
        assert check(candidate, "scaled_dot_product", max_examples=16, seed=seed).ok


def variant(module, **replaced):
    return SimpleNamespace(**{"forward": module.forward, "backward": module.backward} | replaced)


def wrong(module, change):
    """backward with its gradients changed."""
    return variant(module, backward=lambda dout, saved: change(tuple(module.backward(dout, saved))))


def first(function):
    return lambda grads: (function(grads[0]), *grads[1:])


def last(function):
    return lambda grads: (*grads[:-1], tree_map(function, grads[-1]))


def one_element(g):
    g = g.copy()
    if g.size:
        g.flat[g.size // 2] *= 1.001
    return g


MODULES = (linear, conv, batch_norm, softmax, gru_cell, squeeze_excitation, scaled_dot_product, multi_head)
CHANGES = {
    "first gradient, 1e-4 off": first(lambda g: g * g.dtype.type(1 + 1e-4)),
    "first gradient, one element 0.1 % off": first(one_element),
    "last gradient, 1e-4 off": last(lambda g: g * g.dtype.type(1 + 1e-4)),
    "last gradient, one element 0.1 % off": last(one_element),
    "last gradient, averaged over two": last(lambda g: g / 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_mistakes_in_gradients_are_found(module, change):
    forward, backward = pair(wrong(module, CHANGES[change]))
    forward.__signature__ = inspect.signature(module.forward)
    report = check(forward, module.__name__.rpartition(".")[2], backward=backward, max_examples=8)
    assert not report.ok and report.verdicts["out"].conforms, str(report)


def test_a_bound_that_allows_everything_would_be_noticed(monkeypatch):
    monkeypatch.setattr(noise, "FACTOR", 1e9)
    forward, backward = pair(wrong(linear, CHANGES["first gradient, 1e-4 off"]))
    assert check(forward, "linear", backward=backward, max_examples=4).ok
