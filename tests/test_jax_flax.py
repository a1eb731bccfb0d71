"""Flax next to the reference, as JAX is in test_frameworks: every target conforms, and a planted fault is noticed."""

import jax.numpy as jnp
import numpy as np
import pytest

from refattn import frameworks
from refattn.oracle.contract import Departure
from tests.test_frameworks import in_every_dtype, judged

pytestmark = pytest.mark.frameworks
flax = pytest.importorskip("flax", reason="flax is not installed: pip install 'refattn[flax]'")


def target(name):
    return next(t for t in frameworks.load("flax").TARGETS if t.name == name)


def test_it_is_available():
    status = frameworks.available()["flax"]
    assert (status.version, status.reason) == (flax.__version__, "")


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("flax"))
def test_it_conforms(target, dtype):
    report = judged(target, "flax", dtype, max_examples=4 * target.times, seed=1)
    assert report.ok and report.examples == 4 * target.times and report.gradients == "judged", str(report)


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("flax"))
def test_a_planted_fault_is_noticed(target, dtype):
    """The largest element of the first output is off by a thousandth, in low precision doubled, and its gradients."""
    right, factor = target.function, 1.001 if dtype in ("float64", "float32") else 2

    def faulty(*args, **options):
        result = right(*args, **options)
        first, *rest = result if isinstance(result, tuple) else (result,)
        one = jnp.unravel_index(jnp.abs(first).argmax(), first.shape)
        first = first.at[one].multiply(factor)
        return (first, *rest) if rest else first

    faulty.__wrapped__ = right  # its signature is the other's
    report = judged(target, "flax", dtype, faulty, max_examples=2, seed=1)
    wrong = [name for name, v in report.verdicts.items() if not v.conforms]
    assert any(name[0] == "d" for name in wrong) and any(name[0] != "d" for name in wrong), str(report)


@pytest.mark.parametrize("name", ["linen.dot_product_attention", "nnx.dot_product_attention"])
def test_rows_without_keys(name):
    report = judged(target(name), "flax", "float32", families="empty_rows", max_examples=2, seed=1)
    assert report.ok, str(report)
    report = judged(target(name)._replace(convention=None), "flax", "float32", families="empty_rows", max_examples=2)
    assert not report.ok, str(report)  # zero, where no convention is asked for


def test_what_departs_is_passed_over():
    kept = target("nnx.dot_product_attention, weights kept").function
    q, mask = jnp.zeros((1, 1, 3, 4)), np.ones((1, 1, 1, 3), bool)
    with pytest.raises(Departure, match="causal"):
        kept(q, q, q, attn_mask=mask, is_causal=True)
    assert kept(q, q, q, attn_mask=mask.repeat(3, axis=2), is_causal=True).shape == q.shape
