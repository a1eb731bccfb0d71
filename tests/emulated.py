r"""Fused attention kernels as they are written, in NumPy: the same rounding, the same tiles, the same backward by hand.

    forward, backward = kernel(ARITHMETICS["bf16_flash"], "flash", queries=64, keys=128)
    out, lse = forward(q, k, v, attn_bias, sinks, is_causal=True)
    dq, dk, dv, dattn_bias, dsinks = backward(dout, q, k, v, attn_bias, sinks, out, lse, is_causal=True)

Arrays are float32 and hold numbers of the arithmetic's formats (float64 under "float64"). Every variable has a name and
goes through `_stored`, which rounds it as the Arithmetic says. Hooks change a variable, its format, the order of tiles
or which keys take part: so bugs are planted (tests.planted). No code is shared with the reference.

Forward, for the queries i of a tile, and key tiles j one after the other
    logits   softcap tanh(scale query key^T / softcap) + bias, -inf where a key does not take part
    top      the running maximum, with the sink to begin with;   shrink = exp(old top - top)
    weights  exp(logits - top)
    total    shrink total + sum weights
    sum_out  shrink sum_out + probs value,   probs being the weights as cast for the product
    out      sum_out / total,   lse = top + log total;   parts of the keys are merged by lse under "splitk"
Backward, from lse
    d        sum dout out, per query
    weights  exp(logits - lse),   dweights = dout value^T
    dlogits  weights (dweights - d),   dscores = dlogits (1 - tanh^2)
    sum_dq, sum_dk, sum_dv   over the tiles
"naive" does all keys at once, and in backward takes the softmax again, and D = sum weights dweights. An arithmetic's
`chain` is not kept to: it promises less error, never more.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from refattn.oracle.arithmetic import FLOAT64, Arithmetic, round_to

INF, NONE = math.inf, MappingProxyType({})
CHUNK = 16  # products that a tensor core adds exactly before it rounds
ARGUMENTS = "q", "k", "v", "attn_bias", "sinks"
OPTIONS = (
    "scale", "attn_mask", "is_causal", "q_offset", "window", "softcap", "kv_seqlens", "dropout_keep", "dropout_p"
)  # fmt: skip


class Hooks(NamedTuple):
    """Where a bug may take hold. These are the right ones."""

    arithmetic: Callable = lambda a: a
    algorithm: str | None = None  # None: as asked for
    only: str | None = None  # "forward" or "backward": the pass that is wrong; None: both
    given: Callable = lambda given, size: given  # {name: argument or option}; size: keys in a tile
    conditions: Callable = lambda conditions, call: conditions  # {name: True where a key takes part}
    for_heads: Callable = lambda x, heads: x.repeat(heads // x.shape[1], axis=1)
    from_heads: Callable = lambda x, heads: x.reshape(len(x), heads, -1, *x.shape[2:]).sum(axis=2)
    shrink: Callable = lambda x, shape: _shrink(x, shape)  # the gradient of attn_bias over what was stretched
    key_tiles: Callable = lambda tiles, size: tiles
    query_tiles: Callable = lambda tiles, size: tiles
    values: Mapping = NONE  # {name of a variable: function of (value, At) that gives another}
    formats: Mapping = NONE  # {name: (Format, truncates), or a function of the Arithmetic that gives it}
    accumulators: Mapping = NONE  # {name of a product: function of the Arithmetic that gives a Format}
    exp: Callable = np.exp
    tanh: Callable = np.tanh
    masked: float = -INF
    cap_after: str = "scale"  # "bias", "mask"
    saves_lse: bool = True  # False: backward has a right one of its own, whatever forward returned
    sink_in_every_part: bool = False  # of the keys
    bends_bias: bool = False  # the gradient of the bias goes through the soft cap


class Problem(NamedTuple):
    """One call, its options filled in. Axes are (B, H, Q, K) or stretch to it."""

    q: np.ndarray
    k: np.ndarray  # as the heads of queries see it, and so v
    v: np.ndarray
    bias: np.ndarray | None
    sinks: np.ndarray | None
    seen: np.ndarray | None
    keep: np.ndarray | None
    factor: float  # of dropout
    scale: float
    softcap: float | None
    i: np.ndarray
    j: np.ndarray
    positions: np.ndarray  # of the queries
    left: float
    right: float
    lengths: np.ndarray | None  # of the keys


class Run(NamedTuple):
    phase: str
    hooks: Hooks
    arithmetic: Arithmetic
    formats: dict
    algorithm: str
    size: int  # keys in a tile
    problem: Problem


class Running(NamedTuple):
    """What forward keeps of a tile of queries."""

    top: np.ndarray
    total: np.ndarray
    sum_out: np.ndarray
    before: np.ndarray  # the top before the last tile


class At(NamedTuple):
    """Where a value stands."""

    run: Run
    i: np.ndarray
    j: np.ndarray | None = None
    n: int = 0  # of the key tiles, as they are visited
    running: Running | None = None  # before this tile
    shrink: np.ndarray | None = None
    top: np.ndarray | None = None


def kernel(arithmetic, algorithm="flash", hooks=None, *, queries=64, keys=64, order="forward", splits=4):
    """(forward, backward) of a kernel.

    algorithm: "naive", the whole matrix; "flash", tiles and an online softmax; "splitk", the keys in parts, merged.
    queries, keys: in a tile. order of the key tiles: "forward", "reversed", "random". splits: parts of the keys.
    """
    planted = hooks or Hooks()

    def start(phase, arrays, options):
        hooks = planted if planted.only in (None, phase) else Hooks()
        promise = hooks.arithmetic(arithmetic)
        chosen = hooks.algorithm or algorithm
        given = dict(zip(ARGUMENTS, arrays)) | dict.fromkeys(OPTIONS) | {"dropout_p": 0.0} | options
        given = hooks.given(given, keys)
        problem = _pose(given, hooks, np.float64 if arithmetic.inputs == FLOAT64 else np.float32)
        rows, size = queries, keys
        if chosen == "naive":
            rows, size = max(1, len(problem.i)), max(1, len(problem.j))
        elif phase == "backward" and promise.partial is not None:
            rows, size = promise.partial_queries, promise.partial_keys
        run = Run(phase, hooks, promise, _formats(promise, hooks), chosen, size, problem)
        query_tiles = hooks.query_tiles(_tiles(problem.i, rows), rows)
        key_tiles = _ordered(_tiles(problem.j, size), order)
        return run, query_tiles, hooks.key_tiles(key_tiles, size)

    def forward(
        q, k, v, attn_bias=None, sinks=None, *, scale=None, attn_mask=None, is_causal=False, q_offset=None,
        window=None, softcap=None, kv_seqlens=None, dropout_keep=None, dropout_p=0.0,
    ):  # fmt: skip
        values = scale, attn_mask, is_causal, q_offset, window, softcap, kv_seqlens, dropout_keep, dropout_p
        run, query_tiles, key_tiles = start("forward", (q, k, v, attn_bias, sinks), dict(zip(OPTIONS, values)))
        return _forward(run, query_tiles, key_tiles, splits)

    def backward(dout, *arguments, **options):
        """`arguments` are those of forward, as many as it had, then its two outputs."""
        *arrays, out, lse = arguments
        arrays += [None] * (5 - len(arrays))
        run, query_tiles, key_tiles = start("backward", arrays, options)
        if not run.hooks.saves_lse:
            lse = kernel(arithmetic, algorithm, queries=queries, keys=keys)[0](*arrays, **options)[1]
        shapes = [None if x is None else x.shape for x in arrays[1:4]]
        return _backward(run, query_tiles, key_tiles, dout, out, lse, shapes)

    return forward, backward


def _tiles(indices, size):
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _ordered(tiles, order):
    if order == "random":
        return [tiles[n] for n in np.random.default_rng(0).permutation(len(tiles))]
    return tiles[::-1] if order == "reversed" else tiles


# --- the call ---------------------------------------------------------------------------------------------------


def _pose(given, hooks, dtype):
    q, k, v, bias, sinks = (None if given[x] is None else np.asarray(given[x], dtype) for x in ARGUMENTS)
    (batch, heads, queries, features), keys = q.shape, k.shape[2]
    i, j = np.arange(queries), np.arange(keys)
    lengths = given["kv_seqlens"]
    lengths = None if lengths is None else np.reshape(lengths, (-1, 1, 1, 1))
    offset = 0 if given["q_offset"] is None else given["q_offset"]
    if isinstance(offset, str):
        ends = keys if lengths is None else lengths
        offset = 0 if offset == "top_left" else ends - queries
    left, right = (INF if x is None else x for x in given["window"] or (None, None))
    keep, p = given["dropout_keep"], given["dropout_p"]
    scale = 1 / math.sqrt(features) if given["scale"] is None else given["scale"]
    problem = Problem(
        *(q, hooks.for_heads(k, heads), hooks.for_heads(v, heads)),
        None if bias is None else np.broadcast_to(bias, (batch, heads, queries, keys)),
        None if sinks is None else sinks[:, None, None],
        None,
        None if keep is None else np.broadcast_to(keep, (batch, heads, queries, keys)),
        *(dtype(1 / (1 - p)), dtype(scale), given["softcap"], i, j),
        *(i[:, None] + np.reshape(offset, (-1, 1, 1, 1)), left, right, lengths),
    )
    conditions = {} if given["attn_mask"] is None else {"mask": given["attn_mask"]}
    if given["is_causal"]:
        conditions["causal"] = j <= problem.positions
    if left < INF:
        conditions["left"] = j >= problem.positions - left
    if right < INF:
        conditions["right"] = j <= problem.positions + right
    if lengths is not None:
        conditions["lengths"] = j < lengths
    conditions = hooks.conditions(conditions, problem)
    if not conditions:
        return problem
    seen = functools.reduce(np.logical_and, conditions.values())
    return problem._replace(seen=np.broadcast_to(seen, (batch, heads, queries, keys)))


def _shrink(x, shape):
    """x, summed to a shape that stretches to its own."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(n for n, length in enumerate(shape) if length == 1), keepdims=True)


# --- the arithmetic ---------------------------------------------------------------------------------------------


def _formats(a, hooks):
    """{name of a variable: (Format, truncates)}; what is not there is not rounded."""
    stored = ["scores", "scaled", "capped", "biased"]
    forms = {
        **dict.fromkeys(("below", "shrink", "total", "weights", "d"), a.softmax),
        **dict.fromkeys(("sum_dq", "sum_dk", "sum_dv"), a.partial),
        **dict.fromkeys(("dk_of_head", "dv_of_head"), a.shared_heads),
        **dict.fromkeys(("dq", "dk", "dv", "dattn_bias", "dsinks"), a.grad),
        **dict.fromkeys(stored if a.score_roundings > 1 else ["logits"], a.scores),
        **{"scaled_query": a.scaled_query, "probs": a.probs, "dweights": a.dprobs, "dscores": a.dscores},
        **{"out": a.out, "lse": a.lse, "saved_out": a.saved_out},
    }
    forms = {name: (form, False) for name, form in forms.items()}
    return forms | {name: given(a) for name, given in hooks.formats.items()}


def _stored(name, x, at):
    """A variable as the kernel keeps it."""
    run = at.run
    if name in run.hooks.values:
        x = np.asarray(run.hooks.values[name](x, at), x.dtype)
    form, truncates = run.formats.get(name, (None, False))
    x = round_to(x, form, truncate=truncates)
    if run.arithmetic.flush and form is not None:
        x = np.where(np.abs(x) < form.tiny, x * 0, x)
    return x


def _product(name, a, b, at, start=None):
    """start + a @ b as the accumulator has it."""
    arithmetic = at.run.arithmetic
    a, b = (round_to(x, arithmetic.operands, truncate=arithmetic.operands_truncate) for x in (a, b))
    form, truncates = arithmetic.accumulator, arithmetic.accumulator_truncates
    if name in at.run.hooks.accumulators:
        form = at.run.hooks.accumulators[name](arithmetic)
    if not truncates and form.precision >= np.finfo(a.dtype).nmant + 1:
        return a @ b if start is None else start + a @ b
    total = np.zeros((*a.shape[:-1], b.shape[-1])) if start is None else start.astype(np.float64)
    wide = a.astype(np.float64), b.astype(np.float64)
    for n in range(0, a.shape[-1], CHUNK):
        total = round_to(total + wide[0][..., n : n + CHUNK] @ wide[1][..., n : n + CHUNK, :], form, truncate=truncates)
    return total.astype(a.dtype)


def _sum(x, at):
    """Over the last axis, as softmax does."""
    form = at.run.arithmetic.softmax
    if form.precision >= np.finfo(x.dtype).nmant + 1:
        return x.sum(axis=-1, keepdims=True)
    total = np.zeros((*x.shape[:-1], 1), x.dtype)
    for n in range(0, x.shape[-1], CHUNK):
        total = round_to(total + x[..., n : n + CHUNK].sum(axis=-1, keepdims=True), form)
    return total


# --- forward ----------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def _forward(run, query_tiles, key_tiles, splits):
    q, v = run.problem.q, run.problem.v
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.zeros(q.shape[:3], q.dtype)
    groups = [key_tiles]
    if run.algorithm == "splitk":
        groups = [key_tiles[n::splits] for n in range(splits)]
    for i in query_tiles:
        at = At(run, i)
        parts = [_finished(_attend(run, i, tiles, n), at._replace(n=n)) for n, tiles in enumerate(groups)]
        part_out, part_lse = parts[0] if len(parts) == 1 else _merged(parts, at)
        out[..., i, :] = _stored("out", part_out, at)
        lse[..., i] = _stored("lse", part_lse, at)[..., 0]
    return out, lse


def _attend(run, i, tiles, group):
    """The softmax and its product with the values, a tile of keys after the other."""
    c = run.problem
    at = At(run, i)
    rows = (*c.q.shape[:2], len(i), 1)
    top, total = np.full(rows, -INF, c.q.dtype), np.zeros(rows, c.q.dtype)
    if c.sinks is not None:  # the sink is a key without a value, in the first part
        sink = _stored("sink", c.sinks, at)
        if group == 0 or run.hooks.sink_in_every_part:
            top, total = np.broadcast_to(sink, rows), np.where(np.isneginf(sink), 0, total + 1)
    top = _stored("first_top", top, at)
    running = Running(top, _stored("first_total", total, at), np.zeros((*rows[:3], c.v.shape[3]), c.q.dtype), top)
    for n, j in enumerate(tiles):
        at = At(run, i, j, n, running)
        logits, _, _ = _logits(at)
        top = _stored("top", np.maximum(running.top, logits.max(axis=-1, keepdims=True)), at)
        shift = _stored("shift", np.where(np.isneginf(top), 0, top), at)
        weights = _stored("weights", run.hooks.exp(_stored("below", logits - shift, at)), at)
        shrink = _stored("shrink", run.hooks.exp(running.top - shift), at)
        at = at._replace(shrink=shrink, top=top)
        total = _stored("old_total", shrink * running.total, at) + _stored("new_total", _sum(weights, at), at)
        total = _stored("total", total, at)
        if _divides_first(run):
            weights = weights / np.where(total == 0, 1, total)
        probs = _stored("probs", dropped(weights, "keep", at), at)
        value = _stored("value", c.v[..., j, :], at)
        start = _stored("old_out", shrink * running.sum_out, at)
        sum_out = _stored("sum_out", _product("out", probs, value, at, start), at)
        running = Running(top, total, sum_out, running.top)
    return running


def _finished(running, at):
    """(out, lse) of one part of the keys."""
    top, total, sum_out, _ = running
    at = at._replace(running=running)
    total = _stored("last_total", total, at)
    divisor = np.where(total == 0, 1, total)
    out = sum_out if _divides_first(at.run) else sum_out * _stored("reciprocal", 1 / divisor, at)
    out = out if at.run.problem.keep is None else out * _stored("keep_factor", at.run.problem.factor, at)
    lse = np.where(total == 0, -INF, _stored("lse_top", top, at) + np.log(divisor))
    return _stored("part_out", out, at), _stored("part_lse", lse.astype(out.dtype), at)


def _merged(parts, at):
    """Parts of the keys, weighted by e^lse."""
    top = functools.reduce(np.maximum, [lse for _, lse in parts])
    shift = _stored("merge_shift", np.where(np.isneginf(top), 0, top), at)
    shares = [_stored("share", at.run.hooks.exp(lse - shift), at) for _, lse in parts]
    total = functools.reduce(np.add, shares)
    divisor = np.where(total == 0, 1, total)
    out = functools.reduce(np.add, [share * out for share, (out, _) in zip(shares, parts)]) / divisor
    return out, np.where(total == 0, -INF, shift + np.log(divisor)).astype(out.dtype)


def _divides_first(run):
    return run.algorithm == "naive" and run.arithmetic.probs_normalised


def dropped(x, name, at):
    """What dropout leaves of x."""
    keep = at.run.problem.keep
    return x if keep is None else x * _stored(name, keep[..., at.i[:, None], at.j].astype(x.dtype), at)


def _logits(at):
    """The logits of a tile; the tanh in them, or None; and the query, as it was multiplied."""
    run, c, i, j = at.run, at.run.problem, at.i, at.j
    scale = _stored("scale", c.scale, at)
    query, key = c.q[..., i, :], _stored("key", c.k[..., j, :], at)
    before = run.arithmetic.scaled_query is not None
    if before:
        query = _stored("scaled_query", query * scale, at)
    x = _stored("scores", _product("scores", query, key.swapaxes(-1, -2), at), at)
    if not before:
        x = _stored("scaled", x * scale, at)
    bent = None
    for step in ("scale", "bias", "mask"):
        if step == "bias" and c.bias is not None:
            x = _stored("biased", x + _stored("bias", c.bias[..., i[:, None], j], at), at)
        if step == "mask" and c.seen is not None:
            x = np.where(c.seen[..., i[:, None], j], x, np.asarray(run.hooks.masked, x.dtype))
        if step == run.hooks.cap_after and c.softcap is not None:
            bent = run.hooks.tanh(x / x.dtype.type(c.softcap))
            x = _stored("capped", x.dtype.type(c.softcap) * bent, at)
    return _stored("logits", x, at), bent, query


# --- backward ---------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def _backward(run, query_tiles, key_tiles, dout, out, lse, shapes):
    c, a = run.problem, run.arithmetic
    dtype = c.q.dtype
    dout, out, lse = (np.asarray(x, dtype) for x in (dout, out, lse))
    dq, dk, dv = np.zeros_like(c.q), np.zeros_like(c.k), np.zeros_like(c.v)
    dbias = np.zeros((*c.q.shape[:3], c.k.shape[2]), dtype) if c.bias is not None else None
    dsinks = np.zeros(c.q.shape[1], dtype)
    for i in query_tiles:
        at = At(run, i)
        saved = _stored("saved_lse", lse[..., i, None], at)
        dy = dout[..., i, :]
        d = _stored("d", (dy * _stored("saved_out", out[..., i, :], at)).sum(axis=-1, keepdims=True), at)
        for n, j in enumerate(key_tiles):
            at = At(run, i, j, n)
            logits, bent, query = _logits(at)
            if run.algorithm == "naive":
                weights = _stored("weights", _softmax(logits, at), at)
            else:
                weights = _stored("weights", run.hooks.exp(logits - np.where(np.isneginf(saved), INF, saved)), at)
            probs = _stored("probs", weights, at)
            in_dv = dropped(_stored("probs_in_dv", probs, at), "keep_in_dv", at)
            sum_dv = _product("dv", in_dv.swapaxes(-1, -2), dy, at, dv[..., j, :])
            dv[..., j, :] = _stored("sum_dv", sum_dv, at)
            value = _stored("value", c.v[..., j, :], at)
            dweights = _product("dweights", dy, value.swapaxes(-1, -2), at)
            if c.keep is not None:
                factor = _stored("keep_factor_in_dweights", c.factor, at)
                dweights = dropped(dweights * factor, "keep_in_dweights", at)
            dweights = _stored("dweights", dweights, at)
            factor = probs if a.probs_in_dscores else _stored("weights_in_dlogits", weights, at)
            if run.algorithm == "naive":
                d = _stored("d", (factor * dweights).sum(axis=-1, keepdims=True), at)
            dlogits = factor * (dweights - d)
            if c.seen is not None:
                dlogits = np.where(c.seen[..., i[:, None], j], dlogits, 0)
            dlogits = _stored("dlogits", dlogits, at)
            dbent = dlogits if bent is None else dlogits * _stored("slope", 1 - bent * bent, at)
            dscores = _stored("dscores", dbent, at)
            if dbias is not None:
                dbias[..., i[:, None], j] += dbent if run.hooks.bends_bias else dlogits
            key = _stored("key", c.k[..., j, :], at)
            dq[..., i, :] = _stored("sum_dq", _product("dq", dscores, key, at, dq[..., i, :]), at)
            sum_dk = _product("dk", dscores.swapaxes(-1, -2), query, at, dk[..., j, :])
            dk[..., j, :] = _stored("sum_dk", sum_dk, at)
        if c.sinks is not None:
            share = np.exp(_stored("sink", c.sinks, at) - np.where(np.isneginf(saved), INF, saved))
            dsinks -= _stored("terms_of_dsinks", share * d, at).sum(axis=(0, 2, 3))
    at = At(run, c.i)
    scale = _stored("scale", c.scale, at)
    dq = dq * _stored("scale_of_dq", scale, at)
    if a.scaled_query is None:  # else the query in the product has it
        dk = dk * _stored("scale_of_dk", scale, at)
    dv = dv if c.keep is None else dv * _stored("keep_factor_in_dv", c.factor, at)
    of_head = _stored("dk_of_head", dk, at), _stored("dv_of_head", dv, at)
    dk, dv = (x if shape[1] == x.shape[1] else run.hooks.from_heads(x, shape[1]) for x, shape in zip(of_head, shapes))
    return (
        *(_stored(name, x, at) for name, x in {"dq": dq, "dk": dk, "dv": dv}.items()),
        None if dbias is None else _stored("dattn_bias", run.hooks.shrink(dbias, shapes[2]), at),
        None if c.sinks is None else _stored("dsinks", dsinks, at),
    )


def _softmax(logits, at):
    """Of whole rows."""
    c = at.run.problem
    top = logits.max(axis=-1, keepdims=True)
    sink = None if c.sinks is None else _stored("sink", c.sinks, at)
    top = top if sink is None else np.maximum(top, sink)
    shift = np.where(np.isneginf(top), 0, top)
    e = at.run.hooks.exp(_stored("below", logits - shift, at))
    total = _stored("total", _sum(e, at) + (0 if sink is None else np.exp(sink - shift)), at)
    return e / np.where(total == 0, 1, total)
