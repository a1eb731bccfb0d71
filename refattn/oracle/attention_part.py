"""What the error bounds of dot-product attention are made of: the numbers of one item, some heads and some queries.

Exponents are formed in float64; everything else is in float32 where the arithmetic is no finer than that, since a bound
need not be known to more than three digits (bounds.SLACK). Axes are h heads, r queries, K keys, D and E features.
"""

from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product.dot_product_attention import (
    for_heads,
    mask_at,
    scores,
    settle,
    silence,
    visible,
)
from refattn.oracle.arithmetic import FLOAT32, Arithmetic

OPTIONS = {
    "attn_mask": None, "dropout_keep": None, "dropout_p": 0.0, "scale": None, "is_causal": None, "q_offset": None,
    "window": None, "softcap": None, "q_seqlens": None, "kv_seqlens": None, "convention": None,
}  # fmt: skip
ELEMENTS = 2**19  # scores of a part, so that its temporaries stay in the cache
LARGE = 1e9  # beyond it squares of float32 numbers might overflow


class Problem(NamedTuple):
    """A whole call, and what came of it in exact arithmetic, with NaN and inf replaced by 0."""

    q: Any  # (B, H, Q, D)
    k: Any  # (B, H, K, D), as the query heads see it; and so v
    v: Any
    bias: Any  # (B, H, Q, K), or None
    sinks: Any
    mask: Any
    keep: Any
    dy: Any
    dlse: Any
    y: Any
    dq: Any
    rules: Any
    dtype: Any
    arithmetic: Arithmetic


class Part(NamedTuple):
    """Arrays are (h, r, K) where nothing else is said."""

    arithmetic: Arithmetic
    scale: float
    softcap: float | None
    cap_last: bool  # the soft cap comes after the bias
    biased: bool
    q: Any  # (h, r, D)
    k: Any  # (h, K, D)
    v: Any  # (h, K, E)
    centred: Any  # v without what all keys have in common, which does not matter
    x: Any  # scaled products, with their signs
    s: Any  # logits, absolute, 0 where not alive
    below: Any  # how far the logit is below the largest
    t: Any  # tanh of the soft cap, and its slope
    slope: Any
    seen: Any  # where the logit is computed, not given by a mask
    alive: Any  # where p is not 0, be it ever so small
    p: Any
    kept: Any  # the factor of dropout, or None
    sink: Any  # its share (h, r, 1); 0 without
    sink_below: Any
    top: Any  # (h, r, 1), absolute: the largest logit, log of the sum, and lse
    log_total: Any
    lse: Any
    total: Any
    records: Any  # (h, r, 1): how often the running maximum moves from tile to tile, at most
    dead: Any  # (h, r, 1): attends to nothing
    y: Any  # (h, r, E)
    centre: Any  # (h, 1, E): v - centred
    dy: Any  # (h, r, E), or None as all that follows
    dq: Any  # (h, r, D)
    dp: Any  # absolute
    ds: Any  # p (dp - D), with its sign; and |dp - D|
    delta: Any
    d: Any  # D = sum p dp, absolute (h, r, 1)


class Units(NamedTuple):
    """The unit roundoffs of an arithmetic, doubled where it truncates, 0 where nothing is rounded."""

    acc: float
    op: float
    query: float
    score: float
    softmax: float
    prob: float
    dprob: float
    dscore: float
    lost_prob: float  # the most by which a small p may be off; and so of the others
    lost_dscore: float
    lost_dprob: float
    lost_score: float
    lost_query: float
    floor: float  # below it float32 and the accumulator lose digits


def units(a):
    def unit(form, truncates=False):
        return 0.0 if form is None else form.u * (2 if truncates else 1)

    def lost(form):
        return 0.0 if form is None else form.tiny if a.flush else form.eta

    return Units(
        unit(a.accumulator, a.accumulator_truncates),
        unit(a.operands, a.operands_truncate),
        *map(unit, (a.scaled_query, a.scores, a.softmax, a.probs, a.dprobs, a.dscores)),
        a.softmax.tiny + lost(a.probs),
        *map(lost, (a.dscores, a.dprobs, a.scores, a.scaled_query)),
        max(a.softmax.tiny, a.accumulator.tiny),
    )


def chain(a, n):
    """The longest chain of additions in a sum of n terms."""
    return n if a.chain is None else min(n, a.chain)


def tiles(a, keys):
    return max(1, -(-keys // a.tile))


VISIBLE = 1e-30  # what is lost of p below it is covered by the floor


def pose(call, dout, values, arithmetic):
    """The Problem of a canonical call."""
    q, k, v, bias, sinks = (*call.args, *(None,) * (5 - len(call.args)))
    options = OPTIONS | {name: x for name, x in call.options.items() if name in OPTIONS}
    mask, keep, p, *rest = (options[name] for name in OPTIONS)
    rules = settle("attention_bounds:", q, k, v, bias, mask, keep, p, *rest)
    full = (*q.shape[:3], k.shape[2])
    order = rules.convention.gqa_order
    dy, dlse = dout[:2] if isinstance(dout, tuple) else (dout, None)
    largest = max(np.abs(_finite(x)).max(initial=0) for x in (q, k, v, dy) if x is not None)
    narrow = arithmetic.softmax.precision <= FLOAT32.precision and largest < LARGE
    q, k, v, dy, dlse, y, dq = map(_finite, (q, k, v, dy, dlse, values["out"], values.get("dq")))
    return Problem(
        *(q, for_heads(k, q.shape[1], order), for_heads(v, q.shape[1], order)),
        None if bias is None else np.broadcast_to(np.where(np.isnan(bias) | (bias == np.inf), 0, bias), full),
        *(sinks, mask, keep, dy, dlse, y, dq, rules, np.float32 if narrow else np.float64, arithmetic),
    )


def _finite(x):
    return None if x is None else np.where(np.isfinite(x), x, 0)


def parts(problem):
    """Yield (item, heads, rows) that cover the call."""
    items, heads, queries, _ = problem.q.shape
    keys = max(1, problem.k.shape[2])
    rows = min(queries, max(64, ELEMENTS // keys))
    several = max(1, ELEMENTS // max(1, keys * rows))
    for b in range(items):
        for h in range(0, heads, several):
            for r in range(0, queries, max(1, rows)):
                yield b, slice(h, min(heads, h + several)), slice(r, min(queries, r + rows))


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def part_of(problem, b, heads, rows):
    """The Part at one place."""
    rules, arithmetic, as_ = problem.rules, problem.arithmetic, problem.dtype
    q, k, v = problem.q[b, heads, rows], problem.k[b, heads], problem.v[b, heads]
    i, j = np.arange(problem.q.shape[2])[rows], np.arange(k.shape[1])
    seen = _seen(problem, b, heads, rows, i, j)
    bias = None if problem.bias is None else problem.bias[b : b + 1, heads, rows]
    logits, stages, uncapped = scores(q[None], k[None], bias, None if seen is None else seen[None], rules)
    s, x = logits[0], stages["scaled"][0]
    if rules.query_lengths is not None:
        s = np.where(i[:, None] < rules.query_lengths[b], s, -np.inf)
    sink = -np.inf if problem.sinks is None else problem.sinks[heads, None, None]
    top = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    dead = np.isneginf(top)
    shift = np.where(dead, 0, top)
    below = (shift - s).astype(as_)
    e = np.exp(-below)
    e_sink = np.exp(sink - shift)
    total = np.where(dead, 1, e.sum(axis=-1, keepdims=True, dtype=np.float64) + e_sink)
    p = (e / total).astype(as_)
    computed = np.ones(1, bool) if seen is None else np.broadcast_to(seen, p.shape)
    alive = np.isfinite(s) & (computed | (p > 0))
    kept = problem.keep
    if kept is not None:
        kept = np.broadcast_to(kept[b if len(kept) > 1 else 0], (problem.q.shape[1], *_sizes(problem)))
        kept = kept[heads, rows].astype(as_) * as_(rules.keep_factor)
    y = problem.y[b, heads, rows]
    centre = _centre(v) if kept is None else np.zeros_like(v[:, :1])
    t = slope = None
    if rules.softcap is not None:
        t = np.tanh(np.where(np.isfinite(uncapped[0]), uncapped[0], 0) / rules.softcap)
        t, slope = np.abs(t).astype(as_), (1 - t * t).astype(as_)
    part = dict(
        arithmetic=arithmetic,
        scale=abs(rules.scale),
        softcap=rules.softcap,
        cap_last=rules.convention.softcap_after != "scale",
        biased=bias is not None,
        **{name: x.astype(as_) for name, x in {"q": q, "k": k, "v": v, "centred": v - centre, "y": y}.items()},
        x=x.astype(as_),
        s=np.where(alive, np.abs(s), 0).astype(as_),
        below=np.where(alive, below, 0),
        t=t,
        slope=slope,
        seen=computed,
        alive=alive,
        p=silence(p, None if seen is None else computed, rules),
        kept=kept,
        sink=e_sink / total if problem.sinks is not None else as_(0),  # float64: its square may be tiny
        sink_below=np.where(e_sink > 0, np.abs(shift - sink), 0) if problem.sinks is not None else as_(0),
        **{"top": np.abs(shift).astype(as_), "log_total": np.abs(np.log(total)).astype(as_)},
        lse=np.abs(np.where(dead, 0, shift + np.log(total))).astype(as_),
        total=total.astype(as_),
        records=_records(s, arithmetic.tile).astype(as_),
        dead=dead,
        centre=centre.astype(as_),
        **dict.fromkeys(("dy", "dq", "dp", "ds", "delta", "d")),
    )
    if problem.dy is not None:
        part |= _backward(problem, part, b, heads, rows, v, as_)
    return Part(**part)


def _backward(problem, part, b, heads, rows, v, as_):
    dy, dq = problem.dy[b, heads, rows].astype(as_), problem.dq[b, heads, rows].astype(as_)
    p, kept = part["p"], part["kept"]
    common = dy @ part["centre"].swapaxes(-1, -2)  # what dp has in common, over the keys
    dp = dy @ part["centred"].swapaxes(-1, -2)
    dp = dp if kept is None else dp * kept
    sink = part["sink"]
    d = (p * dp).sum(axis=-1, keepdims=True) - sink * common  # the sink's own dp is 0
    dlse = 0 if problem.dlse is None else problem.dlse[b, heads, rows, None].astype(as_)
    delta = dp - d + dlse
    return {
        "dy": dy,
        "dq": np.abs(dq),
        "dp": np.abs(dp + common),
        "ds": p * delta,
        "delta": np.abs(delta),
        "d": np.abs(d + common) + np.abs(dlse),
    }


def _centre(v):
    """(h, 1, E): the mean of each feature that is far from 0 for all keys; 0 of others, which would lose digits."""
    if not v.shape[1]:
        return np.zeros_like(v.sum(axis=1, keepdims=True))
    mean, spread = v.mean(axis=1, keepdims=True), v.std(axis=1, keepdims=True)
    return np.where(np.abs(mean) > 3 * spread, mean, 0)


def _sizes(problem):
    return problem.q.shape[2], problem.k.shape[2]


def _seen(problem, b, heads, rows, i, j):
    """Which keys take part, (h, r, K), or None for all."""
    rules = problem.rules
    one = rules._replace(
        offset=rules.offset[b if len(rules.offset) > 1 else 0][None],
        key_lengths=None if rules.key_lengths is None else rules.key_lengths[b][None],
    )
    mask = problem.mask
    if isinstance(mask, np.ndarray):
        mask = mask if mask.ndim == 4 else mask[None, None]
        mask = np.broadcast_to(mask[b if len(mask) > 1 else 0], (problem.q.shape[1], *_sizes(problem)))[heads, rows]
    elif mask is not None:
        mask = mask_at(mask, i, j, rules.offset)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = mask[b if len(mask) > 1 else 0]
        mask = mask[heads] if len(mask) > 1 else mask
    seen = visible(one, mask, i, j)
    seen = None if seen is None else seen.reshape(seen.shape[-3:] if seen.ndim > 2 else (1, *seen.shape))
    return None if seen is None else np.broadcast_to(seen, (problem.q[b, heads].shape[0], len(i), len(j)))


def _records(s, tile):
    """How often the running maximum of a row moves as its tiles go by, in the worse of two orders."""
    if not s.shape[-1]:
        return np.ones((*s.shape[:-1], 1))
    starts = range(0, s.shape[-1], tile)
    tops = np.maximum.reduceat(s, list(starts), axis=-1)
    running = np.maximum.accumulate(tops, axis=-1), np.maximum.accumulate(tops[..., ::-1], axis=-1)
    moves = [(r[..., 1:] > r[..., :-1]).sum(axis=-1, keepdims=True) for r in running]
    return 1 + np.maximum(*moves)
