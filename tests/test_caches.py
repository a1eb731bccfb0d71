"""Caches and packing: parts, packed sequences, pages and caches of keys all give what attention over all gives."""

import numpy as np
import pytest

from refattn import masks
from refattn.attention.dot_product import cached, dot_product_attention, merge_partial, packed, paged, rotary
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


# --- packed -------------------------------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K = (3, 0, 5, 1, 2), (4, 2, 3, 0, 2)  # 11 of both
OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "q_offset": "top_left"},
    {"window": (1, 1), "softcap": 2.0},
    {"window": (2, 0), "scale": 0.3},
]


def offsets(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def drawn(rng, queries=11, keys=11):
    q, k, v = rng.normal(size=(queries, 4, 3)), rng.normal(size=(keys, 2, 3)), rng.normal(size=(keys, 1, 5))
    dout = packed.Out(rng.normal(size=(queries, 4, 5)), rng.normal(size=(4, queries)))
    return (q, k, v, rng.normal(size=4)), dout


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_is_padded(rng, options):
    """dot_product_attention with q_seqlens and kv_seqlens, to which pad leads, and back from which unpad leads."""
    args, dout = drawn(rng)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    out, grads = run(packed, dout, *args, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)

    q, k, v = packed.pad(args[0], cu_q), packed.pad(args[1], cu_k), packed.pad(args[2], cu_k)
    dlse = packed.pad(dout.lse.T[..., None], cu_q)[..., 0]
    lengths = {"q_seqlens": np.array(LENGTHS_Q), "kv_seqlens": np.array(LENGTHS_K)}
    padded, (dq, dk, dv, _, dsinks) = run(
        dot_product_attention,
        dot_product_attention.Out(packed.pad(dout.y, cu_q), dlse),
        *(q, k, v, None, args[3]),
        **({"q_offset": "bottom_right"} | options | lengths),
        return_lse=True,
    )
    same(tuple(out), (packed.unpad(padded.y, cu_q), packed.unpad(padded.lse[..., None], cu_q)[..., 0].T))
    same(grads, (packed.unpad(dq, cu_q), packed.unpad(dk, cu_k), packed.unpad(dv, cu_k), dsinks))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_is_one_sequence_of_documents(rng, options):
    """Where there are as many keys as queries: then a query is as far from a key in its sequence as in the whole."""
    lengths = (3, 1, 4)
    args, dout = drawn(rng, 8, 8)
    cu = offsets(lengths)
    out, grads = run(packed, dout, *args, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True, **options)
    whole, (dq, dk, dv, _, dsinks) = run(
        dot_product_attention,
        dot_product_attention.Out(dout.y.swapaxes(0, 1)[None], dout.lse[None]),
        *(x.swapaxes(0, 1)[None] for x in args[:3]),
        *(None, args[3]),
        attn_mask=masks.document(lengths=lengths),
        return_lse=True,
        **options,
    )
    same(tuple(out), (whole.y[0].swapaxes(0, 1), whole.lse[0]))
    same(grads, (*(d[0].swapaxes(0, 1) for d in (dq, dk, dv)), dsinks))


def test_packed_is_sequence_by_sequence(rng):
    args, dout = drawn(rng)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    out, grads = run(packed, dout.y, *args, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=True)
    dsinks = np.zeros(4)
    for s in range(len(LENGTHS_Q)):
        a, b = slice(*cu_q[s : s + 2]), slice(*cu_k[s : s + 2])
        q, k, v, dy = (x.swapaxes(0, 1)[None] for x in (args[0][a], args[1][b], args[2][b], dout.y[a]))
        seen = np.tri(LENGTHS_Q[s], LENGTHS_K[s], LENGTHS_K[s] - LENGTHS_Q[s], dtype=bool)
        y, (dq, dk, dv, _, dsink) = run(dot_product_attention, dy, q, k, v, None, args[3], attn_mask=seen)
        same((out[a], grads[0][a], grads[1][b], grads[2][b]), tuple(x[0].swapaxes(0, 1) for x in (y, dq, dk, dv)))
        dsinks += dsink
    same(grads[3], dsinks)


def test_packed_sequences_do_not_see_one_another(rng):
    """Not even NaN of another one; gradients neither."""
    args, dout = drawn(rng)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out, grads = run(packed, dout.y, *args[:3], **options)
    spoilt = args[0], args[1].copy(), args[2].copy()
    spoilt[1][cu_k[2] : cu_k[3]] = spoilt[2][cu_k[2] : cu_k[3]] = np.nan
    changed, spoilt_grads = run(packed, dout.y, *spoilt, **options)
    others = [t for t in range(11) if not cu_q[2] <= t < cu_q[3]]
    assert np.isnan(changed[cu_q[2] : cu_q[3]]).all() and np.array_equal(changed[others], out[others])
    assert np.array_equal(spoilt_grads[0][others], grads[0][others])


def test_pad_and_unpad(rng):
    x, cu = rng.normal(size=(6, 2, 3)), np.array([0, 2, 2, 6])
    padded = packed.pad(x, cu)
    assert padded.shape == (3, 2, 4, 3) and np.array_equal(padded[2, 1], x[2:6, 1])
    assert (padded[0, :, 2:] == 0).all() and (padded[1] == 0).all()
    assert np.array_equal(packed.unpad(padded, cu), x)
    assert np.array_equal(packed.unpad(np.pad(padded, ((0, 0), (0, 0), (0, 2), (0, 0))), cu), x)
    assert packed.pad(x[:0], np.array([0])).shape == (0, 2, 0, 3)
    assert np.array_equal(packed.pad(x, cu.astype(np.uint32)), padded)


# --- cached -------------------------------------------------------------------------------------------------

STEPS = [[1] * 6, [6], [3, 1, 2], [2, 0, 4]]


@pytest.mark.parametrize("buffer", [False, True], ids=["appended", "in a buffer"])
@pytest.mark.parametrize("turned", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (2, 0), "softcap": 2.0, "scale": 0.4}], ids=str)
def test_decoding_step_by_step(rng, options, steps, turned, buffer):
    """Is all at once, forward and backward: the gradient of the cache goes back from step to step.

    `turned` says whether queries and keys are rotated for their positions: before each step, or all at once.
    """
    q, k, v = rng.normal(size=(2, 4, 6, 4)), rng.normal(size=(2, 2, 6, 4)), rng.normal(size=(2, 1, 6, 3))
    sinks, dy = rng.normal(size=4), rng.normal(size=(2, 4, 6, 3))

    def rotate(x, start):
        cos, sin = rotary.tables(start + np.arange(x.shape[2]), rotary.frequencies(4))
        cos, sin = (np.broadcast_to(table, (2, *table.shape)) for table in (cos, sin))
        return rotary.forward(x, cos, sin) if turned else (x, None)

    def rotate_back(dx, saved):
        return rotary.backward(dx, saved)[0] if turned else dx

    (all_q, saved_q), (all_k, saved_k) = rotate(q, 0), rotate(k, 0)
    whole, (dq, dk, dv, _, dsinks) = run(
        dot_product_attention, dy, all_q, all_k, v, None, sinks, is_causal=True, **options
    )
    dq, dk = rotate_back(dq, saved_q), rotate_back(dk, saved_k)

    length = 7 if buffer else 0
    past_k, past_v = np.zeros((2, 2, length, 4)), np.zeros((2, 1, length, 3))
    start, ys, tape = 0, [], []
    for tokens in steps:
        now = slice(start, start + tokens)
        (q_now, turn_q), (k_now, turn_k) = rotate(q[:, :, now], start), rotate(k[:, :, now], start)
        place = {"cache_seqlens": np.array([start, start])} if buffer else {}
        (y, past_k, past_v), saved = cached.forward(
            q_now, k_now, v[:, :, now], past_k, past_v, sinks, **place, **options
        )
        ys.append(y)
        tape.append((now, turn_q, turn_k, saved))
        start += tokens
    same(np.concatenate(ys, axis=2), whole)
    same((past_k[:, :, :6], past_v[:, :, :6]), (all_k, v))

    dpast_k, dpast_v = np.zeros_like(past_k), np.zeros_like(past_v)
    got = [np.zeros_like(x) for x in (q, k, v, sinks)]
    for now, turn_q, turn_k, saved in reversed(tape):
        dout = cached.Out(dy[:, :, now], dpast_k, dpast_v)
        dq_now, dk_now, dv_now, dpast_k, dpast_v, dsinks_now = cached.backward(dout, saved)
        got[0][:, :, now], got[1][:, :, now] = rotate_back(dq_now, turn_q), rotate_back(dk_now, turn_k)
        got[2][:, :, now] = dv_now
        got[3] += dsinks_now
    same(tuple(got), (dq, dk, dv, dsinks))


@pytest.mark.parametrize("causal", [True, False])
def test_buffers_filled_to_different_lengths(rng, causal):
    """Every item is what it is alone with its own past appended to; places that are not filled are never read."""
    q, k, v = rng.normal(size=(3, 2, 2, 4)), rng.normal(size=(3, 1, 2, 4)), rng.normal(size=(3, 2, 2, 3))
    past_k, past_v = rng.normal(size=(3, 1, 7, 4)), rng.normal(size=(3, 2, 7, 3))
    filled = np.array([0, 5, 3])
    for b, n in enumerate(filled):
        past_k[b, :, n:], past_v[b, :, n:] = np.nan, np.inf
    dout = cached.Out(rng.normal(size=(3, 2, 2, 3)), *(rng.normal(size=x.shape) for x in (past_k, past_v)))
    out, grads = run(cached, dout, q, k, v, past_k, past_v, cache_seqlens=filled, is_causal=causal)
    for b, n in enumerate(filled):
        one = slice(b, b + 1)
        own = q[one], k[one], v[one], past_k[one, :, :n], past_v[one, :, :n]
        later = cached.Out(dout.y[one], dout.present_k[one, :, : n + 2], dout.present_v[one, :, : n + 2])
        alone, alone_grads = run(cached, later, *own, is_causal=causal)
        same((out.y[one], out.present_k[one, :, : n + 2], out.present_v[one, :, : n + 2]), tuple(alone))
        same(tuple(g[one] for g in grads[:3]), alone_grads[:3])
        same((grads[3][one, :, :n], grads[4][one, :, :n]), alone_grads[3:5])
        for present, past, dpresent, dpast in zip(out[1:], (past_k, past_v), dout[1:], grads[3:5]):
            assert np.array_equal(present[b, :, n + 2 :], past[b, :, n + 2 :], equal_nan=True)
            assert (dpast[b, :, n : n + 2] == 0).all(), "what was overwritten has no gradient"
            assert np.array_equal(dpast[b, :, n + 2 :], dpresent[b, :, n + 2 :]), "what is not read is passed on"


# --- paged --------------------------------------------------------------------------------------------------


def in_pages(rng):
    """Three items of 5, 0 and 7 tokens in pages of 3, the first page of two of them the same."""
    table = np.array([[4, 2, -1], [-1, 99, -7], [4, 0, 5]])
    q, k, v = rng.normal(size=(3, 4, 3, 2)), rng.normal(size=(6, 3, 2, 2)), rng.normal(size=(6, 3, 1, 5))
    return (q, k, v, rng.normal(size=4)), {"block_table": table, "kv_seqlens": np.array([5, 0, 7])}


PLACES = {  # of every item: page and place in it
    0: [(4, 0), (4, 1), (4, 2), (2, 0), (2, 1)],
    1: [],
    2: [(4, 0), (4, 1), (4, 2), (0, 0), (0, 1), (0, 2), (5, 0)],
}
READ = {place for places in PLACES.values() for place in places}


@pytest.mark.parametrize("options", [{}, *OPTIONS[1:], {"is_causal": True, "q_offset": np.array([2, 0, 4])}], ids=str)
def test_pages_are_what_lies_in_them(rng, options):
    """Item by item as if it had its keys and values in one piece; a page of two items gets the gradients of both."""
    (q, k, v, sinks), where = in_pages(rng)
    dout = paged.Out(rng.normal(size=(3, 4, 3, 5)), rng.normal(size=(3, 4, 3)))
    out, (dq, dk, dv, dsinks) = run(paged, dout, q, k, v, sinks, **where, **options, return_lse=True)
    expected = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros_like(sinks)
    for b, places in PLACES.items():
        one = slice(b, b + 1)
        own_k, own_v = (
            np.stack([x[p] for p in places], axis=1)[None] if places else np.zeros((1, x.shape[2], 0, x.shape[3]))
            for x in (k, v)
        )
        said = {"q_offset": "bottom_right"} | options
        said["q_offset"] = said["q_offset"][one] if isinstance(said["q_offset"], np.ndarray) else said["q_offset"]
        of_one = dot_product_attention.Out(dout.y[one], dout.lse[one])
        alone, grads = run(dot_product_attention, of_one, q[one], own_k, own_v, None, sinks, **said, return_lse=True)
        same((out.y[one], out.lse[one]), (alone.y, alone.lse))
        expected[0][one] = grads[0]
        expected[3][:] += grads[4]
        for j, place in enumerate(places):
            expected[1][place] += grads[1][0, :, j]
            expected[2][place] += grads[2][0, :, j]
    same((dq, dk, dv, dsinks), expected)


def test_what_no_length_reaches_is_not_read(rng):
    (q, k, v, sinks), where = in_pages(rng)
    dy = rng.normal(size=(3, 4, 3, 5))
    clean = run(paged, dy, q, k, v, sinks, **where)
    for place in np.ndindex(6, 3):
        if place not in READ:
            k[place], v[place] = np.nan, np.inf
    spoilt = run(paged, dy, q, k, v, sinks, **where)
    for (path, a), (_, b) in zip(leaves(clean), leaves(spoilt), strict=True):
        assert np.array_equal(a, b), path
    _, (_, dk, dv, _) = spoilt
    assert all((dx[place] == 0).all() for dx in (dk, dv) for place in np.ndindex(6, 3) if place not in READ)


def test_which_page_is_which_does_not_matter(rng):
    """Pages in another order, and the table with them."""
    (q, k, v, sinks), where = in_pages(rng)
    dy, order = rng.normal(size=(3, 4, 3, 5)), rng.permutation(6)
    table = where["block_table"]
    renamed = np.where((table >= 0) & (table < 6), np.argsort(order)[np.clip(table, 0, 5)], table)
    y, (dq, dk, dv, dsinks) = run(paged, dy, q, k, v, sinks, **where)
    moved = run(paged, dy, q, k[order], v[order], sinks, **where | {"block_table": renamed})
    same((y, (dq, dk[order], dv[order], dsinks)), moved)


def test_pages_and_packed_and_cached_agree(rng):
    """One cache, three ways to hold it: the last two tokens of each item attend."""
    lengths, q = np.array([4, 2, 5]), rng.normal(size=(3, 2, 2, 3))
    k, v = rng.normal(size=(3, 1, 5, 3)), rng.normal(size=(3, 2, 5, 4))
    table = np.arange(9).reshape(3, 3)
    pages = []
    for x in (k, v):
        long = np.zeros((3, 6, *x.shape[1::2]))
        long[:, :5] = x.swapaxes(1, 2)
        pages.append(long.reshape(9, 2, *x.shape[1::2]))
    y, _ = paged.forward(q, *pages, block_table=table, kv_seqlens=lengths, is_causal=True)

    cu_q, cu_k = offsets([2, 2, 2]), offsets(lengths)
    line = packed.unpad(k, cu_k), packed.unpad(v, cu_k)
    other, _ = packed.forward(packed.unpad(q, cu_q), *line, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, is_causal=True)
    same(packed.pad(other, cu_q), y)

    new = [np.stack([x[b, :, n - 2 : n] for b, n in enumerate(lengths)]) for x in (k, v)]
    out, _ = cached.forward(q, *new, k, v, cache_seqlens=lengths - 2)
    same(out.y, y)


# --- integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64, np.int32])
def test_lengths_may_be_unsigned(rng, dtype):
    """More queries than keys: the offset is negative, which no unsigned number is."""
    (q, k, v, sinks), where = in_pages(rng)
    q = np.concatenate([q, q, q], axis=2)
    where["block_table"] = np.maximum(where["block_table"], 0)
    options = {"is_causal": True, "window": (3, 0)}
    expected, _ = paged.forward(q, k, v, sinks, **where, **options)
    got, _ = paged.forward(q, k, v, sinks, **{name: x.astype(dtype) for name, x in where.items()}, **options)
    assert np.array_equal(got, expected)

    args, _ = drawn(rng)
    cu = {"cu_seqlens_q": offsets(LENGTHS_Q), "cu_seqlens_k": offsets(LENGTHS_K)}
    expected, _ = packed.forward(*args, **cu, **options)
    got, _ = packed.forward(*args, **{name: x.astype(dtype) for name, x in cu.items()}, **options)
    assert np.array_equal(got, expected)

    x, filled = rng.normal(size=(2, 1, 5, 2)), np.array([0, 2])
    expected, _ = cached.forward(x[:, :, :3], x[:, :, :3], x[:, :, :3], x, x, cache_seqlens=filled)
    got, _ = cached.forward(x[:, :, :3], x[:, :, :3], x[:, :, :3], x, x, cache_seqlens=filled.astype(dtype))
    assert np.array_equal(got.y, expected.y)


# --- torch --------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_packed_is_torchs_attention_of_jagged_tensors(rng):
    """Which on a CPU knows no causal mask; varlen_attn itself needs a GPU."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    lengths_q, lengths_k = (3, 5, 1), (4, 3, 2)
    arrays = rng.normal(size=(9, 2, 3)), rng.normal(size=(9, 2, 3)), rng.normal(size=(9, 2, 4))
    dy = rng.normal(size=(9, 2, 4))
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    jagged = []
    for x, lengths in zip(tensors, (lengths_q, lengths_k, lengths_k)):
        where = {"offsets": torch.tensor(offsets(lengths)), "min_seqlen": min(lengths), "max_seqlen": max(lengths)}
        jagged.append(torch.nested.nested_tensor_from_jagged(x, **where).transpose(1, 2))
    theirs = torch.nn.functional.scaled_dot_product_attention(*jagged).transpose(1, 2).values()
    expected = torch.autograd.grad(theirs, tensors, torch.tensor(dy))
    ours = run(packed, dy, *arrays, cu_seqlens_q=offsets(lengths_q), cu_seqlens_k=offsets(lengths_k))
    same((ours[0], ours[1][:3]), (theirs.detach().numpy(), tuple(x.numpy() for x in expected)))


@pytest.mark.frameworks
def test_paged_is_torchs_pool_of_pages(rng):
    """torch gathers nothing: queries see the whole pool, under a mask that its PagedAttention makes of the table."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    experimental = pytest.importorskip("torch.nn.attention.experimental._paged_attention")
    from torch.nn.attention.flex_attention import create_block_mask

    size, queries, lengths = 4, 2, (5, 3, 8)
    pool = experimental.PagedAttention(7, size, 3, device="cpu")
    for item, length in ((2, 4), (0, 5), (1, 3), (2, 8)):
        pool.reserve(torch.tensor(item), torch.tensor(length))
    shared = pool.page_table[0, 0].item()  # it has no call that shares a page: the second item gets that of the first
    pool.page_table[1, 0], pool.physical_to_logical[1] = shared, -1
    pool.physical_to_logical[1, shared] = 0

    def takes_part(b, h, i, j):
        length = torch.tensor(lengths)[b]
        return (j < length) & (j <= i + length - queries)

    logical = create_block_mask(takes_part, 3, None, queries, 8, device="cpu", BLOCK_SIZE=(queries, size))
    physical = pool.convert_logical_block_mask(logical, kv_len=torch.tensor(lengths)).mask_mod
    seen = [[[bool(physical(*map(torch.tensor, (b, 0, i, j)))) for j in range(28)] for i in range(2)] for b in range(3)]

    q, k, v = rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(7, 4, 2, 3)), rng.normal(size=(7, 4, 2, 5))
    dy = rng.normal(size=(3, 2, 2, 5))
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    whole = [x.reshape(28, 2, -1).transpose(0, 1).expand(3, -1, -1, -1) for x in tensors[1:]]
    mask = torch.tensor(seen)[:, None]
    theirs = torch.nn.functional.scaled_dot_product_attention(tensors[0], *whole, attn_mask=mask)
    expected = torch.autograd.grad(theirs, tensors, torch.tensor(dy))
    where = {"block_table": pool.page_table.numpy(), "kv_seqlens": np.array(lengths)}
    ours = run(paged, dy, q, k, v, **where, is_causal=True)
    same((ours[0], ours[1][:3]), (theirs.detach().numpy(), tuple(x.numpy() for x in expected)))
