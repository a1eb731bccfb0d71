r"""Dot-product attention in blocks, which never holds the attention map.

The mathematics and the options are those of dot_product_attention; only the memory differs: O(Q + K) beside inputs and
outputs, whatever the blocks. `forward_backward` does both passes in one; `sampled` gives exact numbers for a few
queries and keys of sequences that are far too long to do whole.

Paper: Dao, Fu, Ermon, Rudra and Re, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
NeurIPS 2022 (arXiv:2205.14135); the softmax that is corrected as its maximum grows is that of Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).

Shapes
    As in dot_product_attention.

Forward, for one query and one block of keys after the other, l being the logits of dot_product_attention
    m' = max(m, max_j l_j)                    m starts at -inf, or at the sink
    z' = z e^{m - m'} + sum_j e^{l_j - m'}    z starts at 0, or at 1 with a sink
    y' = y e^{m - m'} + sum_j e^{l_j - m'} keep_j / (1 - dropout_p) v_j
    and in the end  y = y' / z',  lse = m' + log z'

Backward, with a bar for "gradient of the loss with respect to"; again for one block after the other
    p_ij    = e^{l_ij - lse_i}                the logits are computed once more, or were kept
    pull_i  = lsebar_i - ybar_i . y_i         = lsebar_i - sum_j pbar_ij p_ij: no sum over blocks is needed
    lbar_ij = p_ij (pbar_ij + pull_i)         and all the rest as in dot_product_attention

Choices
    block = (queries, keys) at a time; None leaves it to the sizes. Blocks in which nothing takes part are left out,
    unless what is masked could show: NaN or inf in it, or a finite mask_value.
    The work is cut into parts, by heads and by queries, from the sizes alone, so that the result does not depend on who
    does them: `jobs` threads (all cores unless given), or any concurrent.futures.Executor, also that of Dask or MPI.
    The threads of NumPy's matrix product are told to keep still meanwhile if threadpoolctl is installed; where it is
    not, jobs is 1 unless given.
    There is no return_scores. Under softmax_precision sums are rounded in another order than in dot_product_attention.
"""

import functools
import os
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.attention.dot_product.dot_product_attention import (
    INF,
    Convention,
    Out,
    Rules,
    mask_at,
    only_real,
    scores,
    scores_backward,
    settle,
    shrink,
    silence,
    taken,
    unweigh,
    visible,
    weigh,
)
from refattn.blocks import in_order, usual_jobs
from refattn.core import About, Array, Bools, Call, Ints, Shaped, expect, shaped

ROWS, COLUMNS = 128, 512  # of a block, unless given
KEPT = 2**20  # so many logits of a block of queries, at most, are kept for the backward pass
PART = 8  # blocks of queries in a part
AHEAD = 2**24  # bytes: larger gradients of keys and values are not made before they can be added up


class Whole(NamedTuple):
    """A call, checked."""

    q: Shaped[Array, "B H Q D"]
    k: Shaped[Array, "B G K D"]
    v: Shaped[Array, "B W K E"]
    attn_bias: Shaped[Array, "*bias"] | None
    sinks: Shaped[Array, "H"] | None
    mask: Any
    keep: Shaped[Bools, "B? H? Q? K?"] | None
    rules: Rules
    return_lse: bool
    block: tuple
    jobs: int
    executor: Any


class Saved(NamedTuple):
    call: Whole
    y: Shaped[Array, "B H Q E"]
    top: Shaped[Array, "B H Q"]  # m, and 0 where it is -inf
    total: Shaped[Array, "B H Q"]  # z, with which p = e^{l - m} / z; lse would round away z beside a large m


class Sample(NamedTuple):
    """R chosen rows (queries) and C chosen columns (keys); None for what was not asked for."""

    y: Shaped[Array, "B H R E"] | None = None
    lse: Shaped[Array, "B H R"] | None = None
    dq: Shaped[Array, "B H R D"] | None = None
    dk: Shaped[Array, "B G C D"] | None = None
    dv: Shaped[Array, "B W C E"] | None = None


@shaped
def forward(
    q: Shaped[Array, "B H Q D"],
    k: Shaped[Array, "B G K D"],
    v: Shaped[Array, "B W K E"],
    attn_bias: Shaped[Array, "B? H? Q? K?"] | Shaped[Array, "*bias"] | None = None,
    sinks: Shaped[Array, "H"] | None = None,
    *,
    scale: float | None = None,
    attn_mask: Shaped[Bools, "B? H? Q? K?"] | Shaped[Bools, "Q? K?"] | object = None,
    is_causal: bool | None = None,
    q_offset: int | str | Shaped[Ints, "B"] | None = None,
    window: tuple | None = None,
    softcap: float | None = None,
    q_seqlens: Shaped[Ints, "B"] | None = None,
    kv_seqlens: Shaped[Ints, "B"] | None = None,
    dropout_keep: Shaped[Bools, "B? H? Q? K?"] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    convention: Convention | None = None,
    block: tuple | None = None,
    jobs: int | None = None,
    executor: Any = None,
) -> tuple[Shaped[Array, "B H Q E"] | Out, Saved]:
    call = _whole(
        *(q, k, v, attn_bias, sinks, scale, attn_mask, is_causal, q_offset, window, softcap, q_seqlens, kv_seqlens),
        *(dropout_keep, dropout_p, return_lse, convention, block, jobs, executor),
    )
    y, lse, top, total = outputs = _new_outputs(call)
    for place, results in _parts(_forward, call):
        _put(outputs, place, results)
    return Out(y, lse) if return_lse else y, Saved(call, y, top, total)


@shaped
def backward(
    dout: Shaped[Array, "B H Q E"] | Out, saved: Saved
) -> tuple[
    Shaped[Array, "B H Q D"],
    Shaped[Array, "B G K D"],
    Shaped[Array, "B W K E"],
    Shaped[Array, "*bias"] | None,
    Shaped[Array, "H"] | None,
]:
    call, y, top, total = saved
    dy, dlse = dout[:2] if isinstance(dout, Out) else (dout, None)
    grads = _new_gradients(call, dy)
    for place, results in _parts(_backward, call, dy, dlse, y, top, total):
        _add(grads, place, results)
        del results  # before the next part begins: it may be as large as the gradients
    return grads


def forward_backward(q, k, v, attn_bias=None, sinks=None, *, dout, **options):
    """(out, gradients) of the same arguments and options, in one go: logits that fit are computed only once.

    dout is the gradient of y, or with return_lse an Out of the gradients of y and lse.
    """
    call = _whole(**forward.arguments(q, k, v, attn_bias, sinks, **options))
    dy, dlse = _checked("streaming.forward_backward: dout", dout, call, Out if call.return_lse else np.ndarray)
    y, lse, *_ = outputs = _new_outputs(call)
    grads = _new_gradients(call, dy)
    for place, results in _parts(_both, call, dy, dlse):
        _put(outputs, place, results[:4])
        _add(grads, place, results[4])
        del results  # before the next part begins: it may be as large as the gradients
    return Out(y, lse) if call.return_lse else y, grads


def sampled(
    q, k, v, attn_bias=None, sinks=None, *, dout=None, rows=None, columns=None, y=None, lse=None, **options
):
    """Exact numbers of a few queries and keys: a Sample.

    rows are positions of queries, for which all keys are gone through: their y, lse and, given dout, dq. columns are
    positions of keys, for which all queries are gone through: their dk and dv. For these the y and lse of every query
    must be known: those of the kernel on trial may be given; otherwise they are computed, which is all of the forward.
    dout is the gradient of y, or an Out of those of y and lse.
    """
    where = "streaming.sampled:"
    call = _whole(**forward.arguments(q, k, v, attn_bias, sinks, **options))
    rows = _chosen(f"{where} rows", rows, q.shape[2])
    columns = _chosen(f"{where} columns", columns, k.shape[2])
    expect(dout is not None or columns is None, f"{where} dout", None, "the gradient of y, as columns are asked for")
    dy, dlse = (None, None) if dout is None else _checked(f"{where} dout", dout, call, (Out, np.ndarray))
    found = {}
    if rows is not None:
        found |= _sampled_rows(call, rows, dy, dlse)
    if columns is not None:
        if y is None or lse is None:
            out, _ = forward(q, k, v, attn_bias, sinks, **options | {"return_lse": True})
            y, lse = out.y, out.lse
        for name, x, shape in (("y", y, dy.shape), ("lse", lse, dy.shape[:3])):
            expect(np.shape(x) == shape, f"{where} {name}.shape", np.shape(x), f"{shape}, one for every query")
        found |= _sampled_columns(call, columns, dy, dlse, y, lse)
    return Sample(**found)


def _whole(
    q, k, v, attn_bias, sinks, scale, attn_mask, is_causal, q_offset, window, softcap, q_seqlens, kv_seqlens,
    dropout_keep, dropout_p, return_lse, convention, block, jobs, executor,
):  # fmt: skip
    """The call of forward with these arguments, its options checked."""
    where = "streaming.forward:"
    rules = settle(
        *(where, q, k, v, attn_bias, attn_mask, dropout_keep, dropout_p, scale, is_causal),
        *(q_offset, window, softcap, q_seqlens, kv_seqlens, convention),
    )
    block = (ROWS, COLUMNS) if block is None else block
    good = isinstance(block, tuple) and len(block) == 2 and all(_positive(n) for n in block)
    expect(good, f"{where} block", block, "None or (queries, keys), two positive ints")
    expect(jobs is None or _positive(jobs), f"{where} jobs", jobs, "None or a positive int")
    fits = executor is None or hasattr(executor, "submit")
    expect(fits, f"{where} executor", executor, "None or a concurrent.futures.Executor")
    jobs = jobs or (usual_jobs() if executor is None else 2 * (os.cpu_count() or 1))
    return Whole(q, k, v, attn_bias, sinks, attn_mask, dropout_keep, rules, return_lse, block, jobs, executor)


def _positive(n):
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0


def _checked(what, dout, call, kinds):
    """(dy, dlse or None) of a cotangent, which fits the output of a call."""
    expect(isinstance(dout, kinds), what, type(dout).__name__, "an array, or an Out where lse is returned")
    dy, dlse = dout[:2] if isinstance(dout, Out) else (dout, None)
    shape = *call.q.shape[:3], call.v.shape[3]
    expect(np.shape(dy) == shape, f"{what}, of y: shape", np.shape(dy), f"(B, H, Q, E) = {shape}")
    expect(dlse is None or np.shape(dlse) == shape[:3], f"{what}, of lse: shape", np.shape(dlse), f"{shape[:3]}")
    return dy, dlse


def _chosen(what, positions, length):
    if positions is None:
        return None
    chosen = np.asarray(positions, dtype=None if len(positions) else int)
    good = chosen.ndim == 1 and chosen.dtype.kind in "iu" and ((chosen >= 0) & (chosen < length)).all()
    expect(good, what, positions, f"a list of ints from 0 to {length - 1}")
    return chosen


# --- one part: some queries of one head, in arrays of two axes -----------------------------------------------


class Part(NamedTuple):
    q: np.ndarray  # (some Q, D)
    k: np.ndarray  # (K, D)
    v: np.ndarray  # (K, E)
    bias: np.ndarray | None  # (some Q or 1, K or 1)
    sink: np.ndarray | None  # a number
    mask: Any
    keep: np.ndarray | None
    i: np.ndarray  # where the queries stand among all
    j: np.ndarray  # and where the keys do
    rules: Rules
    place: tuple  # item and head
    block: tuple
    skip: bool  # whether blocks in which nothing takes part may be left out: they would add exactly nothing


@np.errstate(invalid="ignore", over="ignore")
def _forward(part):
    return _joined([_attend(part, some, [*_columns(part, some)])[0] for some in _rows(part)])


@np.errstate(invalid="ignore", over="ignore")
def _backward(part, dy, dlse, y, top, total, wanted="qkv"):
    part, grads = part._replace(skip=part.skip and _all_finite(dy)), _accumulators(part, dy, wanted)
    for some in _rows(part):
        known = y[some], None, top[some], total[some]
        _pull_back(part, some, [*_columns(part, some)], None, known, dy[some], _of(dlse, some), grads)
    return grads


@np.errstate(invalid="ignore", over="ignore")
def _both(part, dy, dlse, wanted="qkv"):
    part, grads = part._replace(skip=part.skip and _all_finite(dy)), _accumulators(part, dy, wanted)
    results = []
    for some in _rows(part):
        columns = [*_columns(part, some)]
        keep = len(part.i[some]) * sum(where.stop - where.start for where, _ in columns) <= KEPT
        known, kept = _attend(part, some, columns, keep)
        _pull_back(part, some, columns, kept, known, dy[some], _of(dlse, some), grads)
        results.append(known)
    return *_joined(results), grads


def _joined(results):
    return tuple(np.concatenate(r) for r in zip(*results))


def _rows(part):
    """The blocks of queries, as slices."""
    for start in range(0, len(part.i), part.block[0]):
        yield slice(start, start + part.block[0])


def _columns(part, some):
    """The blocks of keys for a block of queries: (slice, what takes part, or None for everything)."""
    i, rules = part.i[some], part.rules
    low, high = i.min() + rules.offset, i.max() + rules.offset
    right = min(rules.right, 0) if rules.is_causal else rules.right
    end = INF if rules.key_lengths is None else rules.key_lengths
    reach = [low - rules.left, high - rules.left, min(low + right + 1, end), min(high + right + 1, end)]
    first, first_of_all, last_of_all, last = np.searchsorted(part.j, reach)  # what some of the queries see, and all
    if not part.skip:
        first, last = 0, len(part.j)
    first_of_all = min(max(first_of_all, first), last)
    last_of_all = min(max(last_of_all, first_of_all), last)
    edges = (first, first_of_all, False), (first_of_all, last_of_all, part.mask is None), (last_of_all, last, False)
    for start, stop, full in edges:
        for here in range(start, stop, part.block[1]):
            where = slice(here, min(here + part.block[1], stop))
            if full:
                yield where, None
                continue
            seen = visible(rules, _mask_at(part, some, where), i, part.j[where])
            if seen is None or seen.all():
                yield where, None
            elif seen.any() or not part.skip:
                yield where, np.broadcast_to(seen, (len(i), where.stop - where.start))


def _attend(part, some, columns, keep=False):
    """Of a block of queries: (y, lse, top, total), and the exponentials if they are to be kept, or None."""
    rules, i, q, dtype = part.rules, part.i[some], part.q[some], np.result_type(part.q, part.k, part.v)
    precision = None if dtype.kind == "c" else rules.convention.softmax_precision
    sink = np.full((1, 1), -INF) if part.sink is None else part.sink.reshape(1, 1)
    top = sink.real.repeat(len(i), axis=0).astype(precision or dtype.type(0).real.dtype)
    total = np.exp(sink - _finite(sink.real)).repeat(len(i), axis=0).astype(precision or np.result_type(dtype, sink))
    y, some_seen, kept = np.zeros((len(i), part.v.shape[1]), dtype), np.zeros((len(i), 1), bool), []
    for where, seen in columns:
        logits, _, uncapped = scores(q, part.k[where], _at(part.bias, some, where), seen, rules)
        e = only_real(logits if precision is None else logits.astype(precision), i, rules, -INF)
        new = np.maximum(top, e.real.max(axis=1, keepdims=True))
        shift = _finite(new)
        e -= shift
        np.exp(e, out=e)
        weights = silence(e, seen, rules).astype(np.result_type(dtype, e), copy=False)
        if part.keep is not None:
            weights = weights * _at(part.keep, some, where) * rules.keep_factor
        correction = np.exp(top - shift)
        total = total * correction + e.sum(axis=1, keepdims=True)
        y = y * correction + weigh(weights, part.v[where], seen, rules)
        top, some_seen = new, some_seen | (True if seen is None else seen.any(axis=1, keepdims=True))
        if keep:
            kept.append((e, shift, uncapped))
    nothing, top, rule = np.isneginf(top), _finite(top), rules.convention.fully_masked
    lse = np.where(nothing, -INF, top + np.log(np.where(nothing, 1, total)))
    nan = nothing & (len(part.j) > 0 if rule == "nan" else some_seen & (rule == "zero_masked_only"))
    total = np.where(only_real(nan, i, rules, False), np.nan, np.where(nothing, INF, total))
    y = y / total if rules.convention.masked_values == "multiply" else np.where(some_seen, y / total, 0)
    y, lse = only_real(y, i, rules, 0), only_real(lse[:, 0], i, rules, -INF)
    return (y, lse.astype(np.result_type(dtype, lse)), top[:, 0], total[:, 0]), kept if keep else None


def _pull_back(part, some, columns, kept, known, dy, dlse, grads):
    """Add to grads what a block of queries gives; `known` is what _attend found."""
    rules, i, q, (y, _, top, total) = part.rules, part.i[some], part.q[some], known
    dy, dlse = only_real(dy, i, rules, 0), only_real(dlse, i, rules, 0)
    pull = ((0 if dlse is None else dlse) - (dy * y).sum(axis=1))[:, None]
    top, total = top[:, None], total[:, None]
    for n, (where, seen) in enumerate(columns):
        k, v = part.k[where], part.v[where]
        if kept is None:
            logits, _, uncapped = scores(q, k, _at(part.bias, some, where), seen, rules)
            softmax = np.exp(only_real(logits, i, rules, -INF) - top) / total
        else:
            e, shift, uncapped = kept[n]
            softmax = e * (np.exp(shift - top) / total)
        softmax = softmax.astype(np.result_type(q, softmax), copy=False)
        dsoftmax = unweigh(dy, v, seen, rules)
        attn = taken(silence(softmax, seen, rules), seen, rules)
        if part.keep is not None:
            factor = _at(part.keep, some, where).astype(dy.real.dtype) * rules.keep_factor
            dsoftmax, attn = dsoftmax * factor, attn * factor
        if grads["v"] is not None:
            grads["v"][where] += attn.T @ dy
        dlogits = only_real(silence(dsoftmax, seen, rules), i, rules, 0) + pull
        dlogits *= softmax
        dproducts, dlogits = scores_backward(dlogits, {}, uncapped, seen, rules)
        if grads["q"] is not None:
            grads["q"][some] += rules.scale * (dproducts @ k)
        if grads["k"] is not None:
            grads["k"][where] += rules.scale * (dproducts.T @ q)
        if grads["attn_bias"] is not None:
            at = _at(grads["attn_bias"], some, where)
            at += shrink(dlogits, at.shape)
    if grads["sinks"] is not None:
        grads["sinks"] += (np.exp(part.sink - top) / total * pull).sum()


def _accumulators(part, dy, wanted):
    """Zeros for the gradients that are wanted: of q, k and v by their letters; "qkv" is all there are."""
    inputs = {"q": part.q, "k": part.k, "v": part.v, "attn_bias": part.bias, "sinks": part.sink}
    chosen = set(inputs) if wanted == "qkv" else set(wanted)
    dtype = np.result_type(dy, *(x for x in inputs.values() if x is not None))
    return {name: _zeros(x, dtype) if x is not None and name in chosen else None for name, x in inputs.items()}


def _zeros(like, dtype, shape=None):
    return np.zeros_like(like, dtype, "C", shape=like.shape if shape is None else shape)


def _finite(x):
    """x with 0 for -inf, which cannot be subtracted from itself."""
    return np.where(np.isneginf(x), 0, x)


def _of(x, some):
    return None if x is None else x[some]


def _at(x, some, where):
    """The block of a bias or a mask, (Q or 1, K or 1)."""
    if x is None:
        return None
    x = x if x.shape[0] == 1 else x[some]
    return x if x.shape[1] == 1 else x[:, where]


def _mask_at(part, some, where):
    if part.mask is None or isinstance(part.mask, np.ndarray):
        return _at(part.mask, some, where)
    return _of_head(mask_at(part.mask, part.i[some], part.j[where], part.rules.offset), *part.place)


# --- the whole, cut into parts --------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a part belongs: an item, its head among those of q, k and v, and some queries."""

    item: int
    head: int
    key_head: int
    value_head: int
    some: Any  # a slice, or an array of positions

    @property
    def of_q(self):
        return self.item, self.head, self.some


def _parts(function, call, *along, columns=None):
    """(place, function(part, ...)) of every part; `along` are arrays (B, H, Q, ...), or None, to be cut likewise."""
    length = PART * call.block[0]
    places = [*_places(call, [slice(start, start + length) for start in range(0, call.q.shape[2], length)])]
    tasks = ((_part(call, place, columns), *(_of(x, place.of_q) for x in along)) for place in places)
    large = (call.k[0, 0].nbytes + call.v[0, 0].nbytes if call.k.size else 0) >= AHEAD
    results = in_order(function, tasks, call.jobs, call.executor, ahead=0 if large else None)
    for place in places:  # zip would keep a result, as large as the gradients may be, until it has the next
        yield place, next(results)


def _places(call, some_queries):
    batch, heads = call.q.shape[:2]
    tiled = call.rules.convention.gqa_order == "tile"
    for item, head in np.ndindex(batch, heads):
        shared = [head % n if tiled else head * n // heads for n in (call.k.shape[1], call.v.shape[1])]
        yield from (Place(item, head, *shared, some) for some in some_queries)


def _part(call, place, columns=None):
    """The part at `place`, with all keys or those at `columns`."""
    item, head, some = place.item, place.head, place.some
    j = np.arange(call.k.shape[2]) if columns is None else columns
    all_keys = slice(None) if columns is None else columns
    rules = call.rules._replace(
        offset=_of_item(call.rules.offset, item),
        query_lengths=_of_item(call.rules.query_lengths, item),
        key_lengths=_of_item(call.rules.key_lengths, item),
    )
    q = call.q[place.of_q]
    k, v = call.k[item, place.key_head][all_keys], call.v[item, place.value_head][all_keys]
    bias, keep = (_at(_of_head(x, item, head), some, all_keys) for x in (call.attn_bias, call.keep))
    mask = call.mask
    if isinstance(mask, np.ndarray):
        mask = _at(_of_head(mask, item, head), some, all_keys)
    i = np.arange(call.q.shape[2])[some]
    sink = None if call.sinks is None else call.sinks[head]
    skip = _may_skip(rules, q, k, v, bias)
    return Part(q, k, v, bias, sink, mask, keep, i, j, rules, (item, head), call.block, skip)


def _may_skip(rules, q, k, v, bias):
    """Whether what is masked adds exactly nothing."""
    say = rules.convention
    return (
        say.mask_value == -INF
        and (rules.softcap is None or say.softcap_after != "mask")
        and (say.masked_values == "skip" or _all_finite(v))
        and (say.mask_op == "replace" or bias is None)
        and _all_finite(q)
        and _all_finite(k)
    )


def _all_finite(x):
    return x.size == 0 or bool(np.isfinite(x.real.max()) and np.isfinite(x.real.min()))


def _of_item(x, item):
    """What a rule of shape (1 or B, 1, 1, 1) says of an item: a number."""
    return None if x is None else x.reshape(-1)[item if x.size > 1 else 0]


def _of_head(x, item, head):
    """What an array that broadcasts to (B, H, Q, K) holds for one head: (Q or 1, K or 1), no copy."""
    if x is None:
        return None
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x[item if len(x) > 1 else 0, head if x.shape[1] > 1 else 0]


def _dtype(call, *more):
    return np.result_type(*(x for x in (*call[:5], *more) if x is not None))


def _new_outputs(call, queries=None):
    """Zeros for y, lse, top and total, of all queries or so many."""
    shape = *call.q.shape[:2], call.q.shape[2] if queries is None else queries
    return tuple(_zeros(call.q, _dtype(call), s) for s in ((*shape, call.v.shape[3]), shape, shape, shape))


def _put(outputs, place, results):
    for whole, some in zip(outputs, results):
        whole[place.of_q] = some


def _new_gradients(call, dy):
    return tuple(None if x is None else _zeros(x, _dtype(call, dy)) for x in call[:5])


def _add(grads, place, results):
    dq, dk, dv, dbias, dsinks = grads
    dq[place.of_q] = results["q"]
    dk[place.item, place.key_head] += results["k"]
    dv[place.item, place.value_head] += results["v"]
    if dbias is not None:
        here = _at(_of_head(dbias, place.item, place.head), place.some, slice(None))
        here += results["attn_bias"]
    if dsinks is not None:
        dsinks[place.head] += results["sinks"]


def _sampled_rows(call, rows, dy, dlse):
    outputs, dq = _new_outputs(call, len(rows)), None
    if dy is not None:
        dq = _zeros(call.q, _dtype(call, dy), (*call.q.shape[:2], len(rows), call.q.shape[3]))
    for place in _places(call, [rows]):
        part, at = _part(call, place), place._replace(some=slice(None))
        if dy is None:
            _put(outputs, at, _forward(part))
        else:
            *results, grads = _both(part, dy[place.of_q], _of(dlse, place.of_q), "q")
            _put(outputs, at, results)
            dq[at.of_q] = grads["q"]
    return {"y": outputs[0], "lse": outputs[1], "dq": dq}


def _sampled_columns(call, columns, dy, dlse, y, lse):
    order = np.argsort(columns)
    nothing = np.isneginf(lse.real)
    top, total = np.where(nothing, 0, lse), np.where(nothing, np.where(np.isnan(y).any(axis=3), np.nan, INF), 1)
    shapes = [(x, (*x.shape[:2], len(columns), x.shape[3])) for x in (call.k, call.v)]
    dk, dv = (_zeros(x, _dtype(call, dy), shape) for x, shape in shapes)
    pull_back = functools.partial(_backward, wanted="kv")
    for place, grads in _parts(pull_back, call, dy, dlse, y, top, total, columns=columns[order]):
        dk[place.item, place.key_head] += grads["k"]
        dv[place.item, place.value_head] += grads["v"]
    back = np.argsort(order)
    return {"dk": dk[:, :, back], "dv": dv[:, :, back]}


def example(draw):
    (*args,), options = dot_product_attention.example(draw)
    del options["return_scores"]
    options["block"] = draw.choice("block", None, (1, 1), (2, 1), (1, 2), (2, 3))
    options["jobs"] = 1
    return Call(tuple(args), options)


ABOUT = About(laws=("batch_independent",), witnesses=("relation",))
