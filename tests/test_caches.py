"""Caches and packing: parts, packed sequences, pages and caches of keys all give what attention over all gives."""

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention, merge_partial
from refattn.core import leaves, tree_map


@pytest.fixture(params=range(3), ids="seed{}".format)
def rng(request):
    return np.random.default_rng(request.param)


def same(one, other, tolerance=1e-12):
    """Two trees agree, to `tolerance` of the largest entry of each leaf; infinities exactly."""
    for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{path}: {a.shape} {a.dtype} and {b.shape} {b.dtype}"
        finite = np.isfinite(b)
        assert np.array_equal(a[~finite], b[~finite]), f"{path}: not finite elsewhere"
        worst, size = np.abs(a[finite] - b[finite]).max(initial=0), np.abs(b[finite]).max(initial=0)
        assert worst <= tolerance * (1 + size), f"{path} differs by {worst:.3g}"


def like(rng, tree):
    return tree_map(lambda x: rng.normal(size=x.shape), tree)


def run(mechanism, dout, *args, **options):
    """(output, (gradient, ...))."""
    out, saved = mechanism.forward(*args, **options)
    return out, tuple(mechanism.backward(dout, saved))


# --- merge_partial ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("owners", [[0] * 7, [0, 0, 0, 1, 1, 1, 1], [2, 0, 1, 0, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
def test_keys_split_in_any_way_and_merged(rng, owners, causal):
    """Part s has the keys that `owners` give it, perhaps none; the mask leaves some queries none of a part."""
    owners = np.array(owners)
    q, sinks = rng.normal(size=(2, 4, 5, 3)), rng.normal(size=4)
    k, v = rng.normal(size=(2, 2, 7, 3)), rng.normal(size=(2, 2, 7, 6))
    mask = rng.random((2, 4, 5, 7)) < 0.4
    mask &= np.tri(5, 7, dtype=bool) if causal else True
    dout = dot_product_attention.Out(rng.normal(size=(2, 4, 5, 6)), rng.normal(size=(2, 4, 5)))
    whole, expected = run(
        dot_product_attention, dout, q, k, v, None, sinks, attn_mask=mask, softcap=2.0, return_lse=True
    )

    parts = []
    for s in range(owners.max() + 1):
        own = owners == s
        args = q, k[:, :, own], v[:, :, own], None, sinks if s == 0 else None
        options = {"attn_mask": mask[..., own], "softcap": 2.0, "return_lse": True}
        parts.append((own, *dot_product_attention.forward(*args, **options)))
    y, lse = (np.stack([getattr(out, name) for _, out, _ in parts]) for name in ("y", "lse"))
    merged, (dy, dlse) = run(merge_partial, merge_partial.Out(dout.y, dout.lse), y, lse)
    same(tuple(merged), (whole.y, whole.lse))

    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dsinks = None
    for s, (own, _, saved) in enumerate(parts):
        grads = dot_product_attention.backward(dot_product_attention.Out(dy[s], dlse[s]), saved)
        dq += grads[0]
        dk[:, :, own], dv[:, :, own] = grads[1:3]
        dsinks = grads[4] if s == 0 else dsinks
    same((dq, dk, dv, dsinks), (expected[0], expected[1], expected[2], expected[4]))


def test_merging_is_associative(rng):
    y, lse = rng.normal(size=(5, 2, 3, 4, 2)), 3 * rng.normal(size=(5, 2, 3, 4))
    lse[1:3, 0, 0, 0] = -np.inf
    groups = [[0], [1, 2], [3, 4]]
    merged = [merge_partial.forward(y[g], lse[g])[0] for g in groups]
    again, _ = merge_partial.forward(np.stack([m.y for m in merged]), np.stack([m.lse for m in merged]))
    same(again, merge_partial.forward(y, lse)[0])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 7.0])
def test_empty_parts_are_not_read(rng, garbage):
    """Not their y, whatever it is; all empty is 0 and -inf; gradients are exactly zero."""
    y, lse = rng.normal(size=(3, 1, 2, 4, 2)), rng.normal(size=(3, 1, 2, 4))
    lse[1], lse[:, 0, 0, 3] = -np.inf, -np.inf
    y = np.where(np.isneginf(lse)[..., None], garbage, y)
    dout = merge_partial.Out(rng.normal(size=(1, 2, 4, 2)), rng.normal(size=(1, 2, 4)))
    with np.errstate(all="raise"):
        out, (dy, dlse) = run(merge_partial, dout, y, lse)
    assert (out.y[0, 0, 3] == 0).all() and np.isneginf(out.lse[0, 0, 3])
    assert (dy[np.isneginf(lse)] == 0).all() and (dlse[np.isneginf(lse)] == 0).all()
    assert np.isfinite(dy).all() and np.isfinite(dlse).all()
    without, _ = merge_partial.forward(y[::2, ..., :3, :], lse[::2, ..., :3])
    same((out.y[..., :3, :], out.lse[..., :3]), tuple(without))


def test_lse_far_apart_do_not_overflow(rng):
    y, lse = rng.normal(size=(3, 1, 1, 2, 2)), np.array([1e4, -1e4, 1e4 - 1]).reshape(3, 1, 1, 1).repeat(2, -1)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, _ = merge_partial.forward(y, lse)
    share = 1 / (1 + np.exp(-1.0))
    same(out.y, share * y[0] + (1 - share) * y[2])
    same(out.lse, np.full((1, 1, 2), 1e4 - np.log(share)))
