"""Heads: how the ways to share, mix, gate and pool them reduce to plain attention, and to what torch computes."""

import numpy as np
import pytest

from refattn.attention.dot_product import grouped_query, scaled_dot_product
from refattn.core import leaves


@pytest.fixture(params=range(3), ids="seed{}".format)
def rng(request):
    return np.random.default_rng(request.param)


def same(one, other, tolerance=1e-12):
    """Two trees agree, to `tolerance` of the largest entry of each leaf."""
    for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert a.shape == b.shape, f"{path}: shapes {a.shape} and {b.shape}"
        assert np.abs(a - b).max(initial=0) <= tolerance * (1 + np.abs(b).max(initial=0)), path


def run(mechanism, dout, *args, **options):
    """(output, gradient, ...)."""
    out, saved = mechanism.forward(*args, **options)
    return out, *mechanism.backward(dout, saved)


# --- grouped queries ----------------------------------------------------------------------------------------


def shared(x, times, order):
    return np.repeat(x, times, axis=1) if order == "repeat_interleave" else np.concatenate([x] * times, axis=1)


def summed(x, groups, order):
    """Over the heads that share."""
    of_group = [x[:, g::groups] if order == "tile" else np.split(x, groups, axis=1)[g] for g in range(groups)]
    return np.stack([part.sum(axis=1) for part in of_group], axis=1)


@pytest.mark.parametrize("order", ["repeat_interleave", "tile"])
@pytest.mark.parametrize("groups, times", [(1, 4), (2, 3), (3, 2), (4, 1)])
def test_grouped_queries_are_repeated_keys(rng, order, groups, times):
    q, k, v = rng.normal(size=(2, groups * times, 5, 3)), *rng.normal(size=(2, 2, groups, 4, 3))
    dy, mask = rng.normal(size=q.shape), rng.random((2, groups * times, 5, 4)) < 0.7
    for options in ({}, {"mask": mask}, {"is_causal": True, "scale": 0.3}, {"is_causal": True, "mask": mask}):
        got = run(grouped_query, dy, q, k, v, order=order, **options)
        y, dq, dk, dv = run(scaled_dot_product, dy, q, shared(k, times, order), shared(v, times, order), **options)
        same(got, (y, dq, summed(dk, groups, order), summed(dv, groups, order)))


def test_tile_is_the_other_order_with_query_heads_reordered(rng):
    q, k, v, dy = rng.normal(size=(2, 6, 5, 3)), *rng.normal(size=(2, 2, 3, 4, 3)), rng.normal(size=(2, 6, 5, 3))
    dealt = [0, 3, 1, 4, 2, 5]  # heads 0 and 3 share, 1 and 4, 2 and 5
    y, dq, dk, dv = run(grouped_query, dy, q, k, v, order="tile")
    same((y[:, dealt], dq[:, dealt], dk, dv), run(grouped_query, dy[:, dealt], q[:, dealt], k, v))
