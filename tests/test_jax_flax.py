"""Flax next to the reference, as JAX is in test_frameworks: some targets conform, and a fault planted is noticed.

Every target in every dtype is what `refattn check all` does.
"""

import numpy as np
import pytest

from refattn import frameworks
from refattn.attention.dot_product import dot_product_attention
from refattn.oracle.contract import Departure
from refattn.oracle.conventions import PRESETS
from refattn.trials import judged
from tests.foreign import target, with_one_off, wrong

pytestmark = pytest.mark.frameworks
jax = pytest.importorskip("jax", reason="jax is not installed: pip install 'refattn[jax]'")
flax = pytest.importorskip("flax", reason="flax is not installed: pip install 'refattn[flax]'")
jnp = jax.numpy


@pytest.fixture(autouse=True)
def unexplained(monkeypatch):
    """What differs is not made smaller, nor explained: XLA compiles every shape that is tried."""
    monkeypatch.setattr("refattn.oracle.check.shrink", lambda judge, trial: trial)
    monkeypatch.setattr("refattn.oracle.check.explain", lambda *given: ())
    monkeypatch.setattr("refattn.oracle.check._coarser", lambda *given: "")


def test_it_is_available():
    assert frameworks.status("flax")[:2] == (flax.__version__, "")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("linen.dot_product_attention", "bfloat16"),
        ("nnx.MultiHeadAttention", "float32"),
        ("linen.OptimizedLSTMCell", "float64"),
    ],
)
def test_it_conforms(name, dtype):
    report = judged(target("flax", name), "flax", dtype, max_examples=4, seed=1)
    assert report.ok and report.examples == 4 and report.gradients == "judged", str(report)


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("linen.dot_product_attention", "bfloat16", 2),  # whose softmax is of 16 bits, too
        ("nnx.MultiHeadAttention", "float32", 1.001),
        ("linen.OptimizedLSTMCell", "float64", 1.001),
        ("linen.Conv", "float64", 1.001),
    ],
)
def test_a_planted_fault_is_noticed(name, dtype, factor):
    """The largest element of the output is off, and its gradients."""

    def spoil(y):
        return y.at[jnp.unravel_index(jnp.abs(y).argmax(), y.shape)].multiply(factor)

    faulty = with_one_off(target("flax", name).function, spoil)
    report = judged(target("flax", name), "flax", dtype, faulty, max_examples=2, seed=1)
    assert all(wrong(report)), str(report)


@pytest.mark.parametrize("name", ["linen.dot_product_attention", "nnx.dot_product_attention"])
def test_rows_without_keys(name):
    """The mean of all values, as the target's convention has it; zero, where none is asked for."""
    q, k, v = (np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype("float32") for _ in "qkv")
    mask = np.array([[False] * 3, [True] * 3, [True, False, True]])
    y = np.asarray(target("flax", name).function(*map(jnp.asarray, (q, k, v)), attn_mask=jnp.asarray(mask)))
    convention = PRESETS[target("flax", name).convention]
    asked, _ = dot_product_attention.forward(q, k, v, attn_mask=mask, convention=convention)
    usual, _ = dot_product_attention.forward(q, k, v, attn_mask=mask)
    assert np.allclose(y, asked, atol=1e-6) and np.allclose(y[..., 1:, :], usual[..., 1:, :], atol=1e-6)
    assert np.allclose(y[..., 0, :], v.mean(axis=2), atol=1e-6) and not usual[..., 0, :].any()


@pytest.mark.parametrize(("dtype", "even"), [("bfloat16", 2**8), ("float16", 2**11)])
def test_in_what_the_gradient_of_a_row_is_summed(dtype, even):
    """`even` + 1 is no number of its dtype: one after the other 15 ones are lost, 32 at most; jnp.sum keeps them."""
    dy = jnp.ones((16, 1), dtype).at[0].set(even)
    _, pullback = jax.vjp(lambda b: b + jnp.zeros((16, 1), dtype), jnp.zeros((1, 1), dtype))
    assert pullback(dy)[0] == even and dy.sum() == even + 16
    s = jnp.full(16, -30, dtype).at[-1].set(0)  # all of the softmax is in the last
    _, pullback = jax.vjp(jax.nn.log_softmax, s)
    assert pullback(dy.ravel())[0][-1] == 1 - even  # of a sum in float32: 14 less
    assert dtype in frameworks.load("jax").SUMS_AS_GIVEN


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_departs_is_passed_over():
    kept = target("flax", "nnx.dot_product_attention, weights kept").function
    q, mask = jnp.zeros((1, 1, 3, 4)), np.ones((1, 1, 1, 3), bool)
    with pytest.raises(Departure, match="causal"):
        kept(q, q, q, attn_mask=mask, is_causal=True)
    assert kept(q, q, q, attn_mask=mask.repeat(3, axis=2), is_causal=True).shape == q.shape
