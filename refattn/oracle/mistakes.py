"""What engineers get wrong in dot-product attention: MISTAKES, a table with the simplest first.

A mistake changes the call before the reference answers it, or the answer after, or both. `change(call)` is another
Call of dot_product_attention, `answer(case)` some other arrays {name: array}; either is None where the mistake makes no
difference, because what it is about is not in use. With `parameters` each gets one of them as its last argument, and
`words` has a place for those that fit.

    out, lse, dq, dk, dv, dattn_bias, dsinks      the names of arrays
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product.dot_product_attention import (
    for_heads,
    from_heads,
    mask_at,
    only_real,
    scores,
    scores_backward,
    settle,
    shrink,
    visible,
)
from refattn.core import Call
from refattn.oracle.attention_part import OPTIONS
from refattn.oracle.bounds import exact, reference

INF = math.inf
TILES = 16, 32, 64, 128
MASK_VALUES = -20.0, -50.0, -100.0, -1e3, -1e4, -3e4, -65504.0, -1e9, -1e30, float(np.finfo(np.float32).min)


class Case(NamedTuple):
    """A call and what the reference answers."""

    call: Call
    dout: Any
    values: dict


class Mistake(NamedTuple):
    name: str
    words: str
    change: Callable | None = None
    answer: Callable | None = None
    parameters: tuple = ()


# --- how calls are taken apart, and changed -------------------------------------------------------------------


class Steps(NamedTuple):
    """A call up to its logits; arrays of (B, H, Q, K), keys and values as the query heads see them."""

    q: Any
    k: Any
    v: Any
    bias: Any
    sinks: Any
    rules: Any
    seen: Any
    kept: Any  # the factor of dropout
    logits: Any
    uncapped: Any
    stages: dict


def arguments(call):
    """q, k, v, attn_bias, sinks."""
    return (*call.args, *(None,) * (5 - len(call.args)))


def rules_of(call):
    q, k, v, bias, _ = arguments(call)
    options = OPTIONS | {name: x for name, x in call.options.items() if name in OPTIONS}
    mask, keep, p, *rest, say = (options[name] for name in OPTIONS)
    return settle("mistakes:", q, k, v, bias, mask, keep, p, *rest, exact(say))


def seen_by(call, rules):
    q, k = call.args[:2]
    i, j = np.arange(q.shape[2]), np.arange(k.shape[2])
    seen = visible(rules, mask_at(call.options.get("attn_mask"), i, j, rules.offset), i, j)
    return None if seen is None else np.broadcast_to(seen, (*q.shape[:3], k.shape[2]))


def steps(call):
    q, k, v, bias, sinks = arguments(call)
    rules = rules_of(call)
    order, seen, keep = rules.convention.gqa_order, seen_by(call, rules), call.options.get("dropout_keep")
    k, v = for_heads(k, q.shape[1], order), for_heads(v, q.shape[1], order)
    logits, stages, uncapped = scores(q, k, bias, seen, rules)
    logits = only_real(logits, np.arange(q.shape[2]), rules, -INF)
    kept = 1.0 if keep is None else keep * rules.keep_factor
    return Steps(q, k, v, bias, sinks, rules, seen, kept, logits, uncapped, stages)


def with_options(call, **options):
    return call._replace(options=call.options | options)


def with_arguments(call, **arrays):
    names = "q", "k", "v", "attn_bias", "sinks"
    return call._replace(args=tuple(arrays.get(name, x) for name, x in zip(names, arguments(call))))


def with_convention(call, **fields):
    return with_options(call, convention=exact(call.options.get("convention"))._replace(**fields))


def mask_of(call, rules):
    """attn_mask as an array of (1 or B, 1 or H, 1 or Q, 1 or K), or None."""
    i, j = np.arange(call.args[0].shape[2]), np.arange(call.args[1].shape[2])
    mask = mask_at(call.options.get("attn_mask"), i, j, rules.offset)
    return None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def with_condition(call, condition, **options):
    """And keys take part only where `condition` holds, which broadcasts to (B, H, Q, K)."""
    mask = mask_of(call, rules_of(call))
    condition = np.asarray(condition)
    condition = condition.reshape((1,) * (4 - condition.ndim) + condition.shape)
    return with_options(call, attn_mask=condition if mask is None else mask & condition, **options)


def places(call, rules):
    """The positions of queries (1 or B, 1, Q, 1) and of keys (K,)."""
    return np.arange(call.args[0].shape[2])[:, None] + rules.offset, np.arange(call.args[1].shape[2])


def given(call, name):
    return call.options.get(name) is not None


def first_of(x, axis):
    """The first along an axis, counted from the end, as long as the axis was; None where that changes nothing."""
    if x is None or x.ndim < -axis or x.shape[axis] == 1:
        return None
    return np.broadcast_to(np.take(x, [0], axis), x.shape)


def empty_rows(call):
    """Queries that may attend to no key, (B, H, Q)."""
    seen = seen_by(call, rules_of(call))
    return np.zeros(call.args[0].shape[:3], bool) if seen is None else ~seen.any(axis=-1)


# --- which keys take part -------------------------------------------------------------------------------------


def _causal_top_left(call):
    asked = call.options.get("q_offset")
    asked = exact(call.options.get("convention")).q_offset if asked is None else asked
    return with_options(call, q_offset=0) if isinstance(asked, str) and asked == "bottom_right" else None


def _causal_bottom_right(call, also_numbers):
    asked, rules = call.options.get("q_offset"), rules_of(call)
    placed = rules.is_causal or rules.left < INF or rules.right < INF
    if not placed or not (also_numbers or asked is None or isinstance(asked, str)):
        return None
    return with_options(call, q_offset="bottom_right")


def _from_padded_keys(call):
    if not (given(call, "kv_seqlens") or given(call, "q_seqlens")) or _causal_top_left(call) is None:
        return None
    return with_options(call, q_offset=call.args[1].shape[2] - call.args[0].shape[2])


def _causal(holds):
    """Another condition in place of j <= p."""

    def change(call):
        rules = rules_of(call)
        if not rules.is_causal:
            return None
        p, j = places(call, rules)
        return with_condition(call, holds(j, p), is_causal=False)

    return change


def _causal_by_groups(call, size):
    rules = rules_of(call)
    if not rules.is_causal:
        return None
    p, j = places(call, rules)
    return with_condition(call, j // size * size <= p, is_causal=False)


def _causal_ignored(call):
    return with_options(call, is_causal=False) if rules_of(call).is_causal else None


def _window(side, by):
    """One end of the window moved; None: no such end."""

    def change(call):
        rules = rules_of(call)
        left, right = rules.left, rules.right
        if (left if side == "left" else right) == INF:
            return None
        window = list(call.options["window"])
        window[side == "right"] = None
        if by is None:
            return with_options(call, window=tuple(window))
        p, j = places(call, rules)
        near = j >= p - left - by if side == "left" else j <= p + right + by
        return with_condition(call, near, window=tuple(window))

    return change


def _window_swapped(call):
    return with_options(call, window=call.options["window"][::-1]) if given(call, "window") else None


def _window_without_offset(call):
    """The left end alone: the right one would show as a wrong diagonal."""
    rules = rules_of(call)
    if rules.left == INF or not rules.offset.any():
        return None
    i, j = np.arange(call.args[0].shape[2])[:, None], np.arange(call.args[1].shape[2])
    return with_condition(call, j >= i - rules.left, window=(None, call.options["window"][1]))


def _no_option(name, value=None):
    return lambda call: with_options(call, **{name: value}) if given(call, name) else None


def _q_offset_ignored(call):
    return with_options(call, q_offset=0) if rules_of(call).offset.any() else None


def _q_offset_number_ignored(call, strings):
    asked = call.options.get("q_offset")
    if asked is None or (isinstance(asked, str) and not strings):
        return None
    return _q_offset_ignored(call)


def _q_offset_of_first_item(call):
    offset = rules_of(call).offset
    return with_options(call, q_offset=int(offset.ravel()[0])) if len(offset) > 1 else None


def _kv_seqlens(change):
    """Other lengths, or None; the diagonal stays where it is, or follows them."""

    def changed(call, diagonal_too):
        if not given(call, "kv_seqlens"):
            return None
        lengths = change(np.asarray(call.options["kv_seqlens"]))
        lengths = None if lengths is None else np.clip(lengths, 0, call.args[1].shape[2])
        if diagonal_too:
            return with_options(call, kv_seqlens=lengths)
        offset = np.broadcast_to(rules_of(call).offset.ravel(), len(call.args[0])).copy()
        return with_options(call, kv_seqlens=lengths, q_offset=offset)

    return changed


def _mask(change):
    def changed(call):
        mask = mask_of(call, rules_of(call))
        mask = None if mask is None else change(mask)
        return None if mask is None else with_options(call, attn_mask=mask)

    return changed


def _transposed(x):
    return x.swapaxes(-1, -2) if x.shape[-1] == x.shape[-2] else None


def _mask_gives_way(call):
    return with_options(call, attn_mask=None) if given(call, "attn_mask") and rules_of(call).is_causal else None


def _mask_value(call, how):
    """Of all that is masked: put in place of the logit, or added to it."""
    value, added = how
    rules = rules_of(call)
    seen = seen_by(call, rules)
    if seen is None or seen.all():
        return None
    if not added:
        return with_convention(call, mask_value=value, mask_op="replace")
    bias = np.zeros(seen.shape) if arguments(call)[3] is None else arguments(call)[3]
    free = dict(attn_mask=None, is_causal=False, window=None, kv_seqlens=None, q_offset=None)
    return with_options(with_arguments(call, attn_bias=bias + np.where(seen, 0, value)), **free)


def _last_dropped(call):
    keys = call.args[1].shape[2]
    return with_condition(call, np.arange(keys) < keys - 1) if keys else None


def _first_dropped(call):
    keys = call.args[1].shape[2]
    return with_condition(call, np.arange(keys) > 0) if keys else None


def _last_tile_dropped(call, tile):
    keys = call.args[1].shape[2]
    return with_condition(call, np.arange(keys) < keys // tile * tile) if keys % tile else None


def _first_tile_twice(call, tile):
    """e^{l + log 2} is e^l twice."""
    keys = call.args[1].shape[2]
    if not keys:
        return None
    twice = np.where(np.arange(keys) < tile, math.log(2), 0)
    bias = arguments(call)[3]
    return with_arguments(call, attn_bias=twice[None] if bias is None else bias + twice)


def _padding(call, how):
    """Keys of zeros up to the tile are one sink more, of the logarithm of how many there are; masks may hide them."""
    (tile, where_masked), keys, rules = how, call.args[1].shape[2], rules_of(call)
    masked = seen_by(call, rules) is not None
    if not keys % tile or rules.is_causal or rules.right < INF or (masked and not where_masked):
        return None
    more = np.full(call.args[0].shape[1], math.log(tile - keys % tile))
    sinks = arguments(call)[4]
    return with_arguments(call, sinks=more if sinks is None else np.logaddexp(sinks, more))


def _padding_answer(case, how):
    """The sinks' own part of the gradient of both."""
    tile, keys, sinks = how[0], case.call.args[1].shape[2], arguments(case.call)[4]
    if "dsinks" not in case.values:
        return {}
    return {"dsinks": case.values["dsinks"] * (1 - np.exp(math.log(tile - keys % tile) - sinks))}


# --- the logits -----------------------------------------------------------------------------------------------


def _scale(other):
    """`other` of (call, scale); None where it is the same."""

    def change(call):
        scale = rules_of(call).scale
        value = other(call, scale)
        return None if value is None or value == scale else with_options(call, scale=float(value))

    return change


def _default_scale(width):
    """In place of the default only."""
    return _scale(lambda call, scale: None if given(call, "scale") else 1 / math.sqrt(max(1, width(call))))


def _padded_width(call, multiple):
    return _default_scale(lambda c: -(-c.args[0].shape[3] // multiple) * multiple)(call)


def _base(call, factor):
    """The scores and the bias, as exp with another base sees them."""
    bias = arguments(call)[3]
    call = with_options(call, scale=rules_of(call).scale * factor)
    if call.options.get("softcap") is not None:
        call = with_options(call, softcap=call.options["softcap"] * factor)
    return call if bias is None else with_arguments(call, attn_bias=bias * factor)


def _base_answer(case, factor):
    return {"dattn_bias": case.values["dattn_bias"] * factor} if "dattn_bias" in case.values else {}


def _softcap_after(place):
    def change(call):
        rules = rules_of(call)
        used = arguments(call)[3] is not None or (place == "mask" and seen_by(call, rules) is not None)
        if rules.softcap is None or not used or rules.convention.softcap_after == place:
            return None
        return with_convention(call, softcap_after=place)

    return change


def _softcap_not_rescaled(call):
    """tanh(s / c) alone is the soft cap 1 of s / c."""
    rules = rules_of(call)
    if rules.softcap in (None, 1) or rules.convention.softcap_after != "scale":
        return None
    return with_options(call, scale=rules.scale / rules.softcap, softcap=1.0)


def _softcap_not_divided(call):
    rules = rules_of(call)
    if rules.softcap in (None, 1) or rules.convention.softcap_after != "scale":
        return None
    return with_options(call, scale=rules.scale * rules.softcap)


def _bias(change):
    def changed(call):
        bias = arguments(call)[3]
        bias = None if bias is None else change(bias, call)
        return None if bias is None else with_arguments(call, attn_bias=bias)

    return changed


def _scaled_bias(bias, call):
    return bias * rules_of(call).scale if np.isfinite(bias).all() else None


def _ignored_bias(bias, call):
    return np.zeros_like(bias)


def _whole_bias(case):
    """The case with a bias that is not stretched."""
    bias = arguments(case.call)[3]
    full = *case.call.args[0].shape[:3], case.call.args[1].shape[2]
    if case.dout is None or bias is None or bias.size == math.prod(full):
        return None
    return reference(with_arguments(case.call, attn_bias=np.broadcast_to(bias, full)), case.dout)["dattn_bias"]


def _bias_not_reduced(case, how):
    """Of the axes that are stretched, all or one, only one place is kept; or the mean is taken."""
    kind, axis = how
    whole = _whole_bias(case)
    if whole is None:
        return None
    shape = arguments(case.call)[3].shape
    padded = (1,) * (4 - len(shape)) + shape
    stretched = [a for a in range(4) if padded[a] < whole.shape[a]]
    if axis is not None and axis not in stretched:
        return None
    for a in stretched if axis is None else [axis]:
        whole = whole.mean(axis=a, keepdims=True) if kind == "mean" else np.take(whole, [-(kind == "last")], axis=a)
    return {"dattn_bias": shrink(whole, shape)}


def _moved(name):
    """The key or value at j is that of j + by; at the end there is none, or the last again, or the first."""

    def change(call, how):
        by, end = how
        x = call.args["qkv".index(name)]
        return None if x.shape[2] < 2 else with_arguments(call, **{name: _shifted(x, by, end)})

    return change


def _shifted(x, by, end):
    x = np.roll(x, -by, axis=2)
    edge = slice(-by, None) if by > 0 else slice(0, -by)
    if end == "zeros":
        x[:, :, edge] = 0
    if end == "last":
        x[:, :, edge] = x[:, :, [-by - 1 if by > 0 else -by]]
    return x


SHIFTS = tuple((by, end) for by in (1, -1) for end in ("last", "around", "zeros"))


# --- heads, items, layouts --------------------------------------------------------------------------------------


def _shares(call):
    """Whether query heads share keys or values."""
    return call.args[1].shape[1] < call.args[0].shape[1] or call.args[2].shape[1] < call.args[0].shape[1]


def _heads_tiled(call):
    if not _shares(call):
        return None
    order = rules_of(call).convention.gqa_order
    return with_convention(call, gqa_order="tile" if order != "tile" else "repeat_interleave")


def _first_head(call):
    firsts = {name: first_of(x, -3) for name, x in zip("kv", call.args[1:3])}
    firsts = {name: x for name, x in firsts.items() if x is not None}
    return with_arguments(call, **firsts) if firsts and _shares(call) else None


def _shared_not_summed(case, how):
    q, k, v = case.call.args[:3]
    if case.dout is None or not _shares(case.call):
        return None
    order, heads = rules_of(case.call).convention.gqa_order, q.shape[1]
    whole = with_arguments(case.call, k=for_heads(k, heads, order), v=for_heads(v, heads, order))
    grads = reference(whole, case.dout)
    found = {}
    for name, x in (("dk", k), ("dv", v)):
        b, _, *rest = grads[name].shape
        times = heads // x.shape[1]
        if order == "tile":
            split = grads[name].reshape(b, times, x.shape[1], *rest).swapaxes(1, 2)
        else:
            split = grads[name].reshape(b, x.shape[1], times, *rest)
        found[name] = split.mean(axis=2) if how == "the mean" else split[:, :, 0 if how == "the first" else -1]
    return found


def _tiled_back(case):
    """Forward has one order of heads, backward the other."""
    if case.dout is None or not _shares(case.call):
        return None
    q, k, v = case.call.args[:3]
    order, heads = rules_of(case.call).convention.gqa_order, q.shape[1]
    other = "tile" if order != "tile" else "repeat_interleave"
    whole = with_arguments(case.call, k=for_heads(k, heads, order), v=for_heads(v, heads, order))
    grads = reference(whole, case.dout)
    return {name: from_heads(grads[name], x.shape[1], other) for name, x in (("dk", k), ("dv", v))}


def _first_item(*names):
    def change(call):
        if len(call.args[0]) == 1:
            return None
        return with_arguments(call, **{n: first_of(call.args["qkv".index(n)], -4) for n in names})

    return change


def _rolled_heads(name):
    """The next shared head, or the shared head of the next query head."""

    def change(call, of_query):
        x, heads = call.args["qkv".index(name)], call.args[0].shape[1]
        x = for_heads(x, heads, rules_of(call).convention.gqa_order) if of_query else x
        return None if x.shape[1] == 1 else with_arguments(call, **{name: np.roll(x, -1, axis=1)})

    return change


def _last_feature_dropped(call):
    k = call.args[1]
    if k.shape[3] < 2:
        return None
    scale = rules_of(call).scale
    return with_options(with_arguments(call, k=k * (np.arange(k.shape[3]) < k.shape[3] - 1)), scale=scale)


def _one_for_other(name, other):
    def change(call):
        x, y = (call.args["qkv".index(n)] for n in (name, other))
        return with_arguments(call, **{name: y}) if x.shape == y.shape else None

    return change


def _q_and_k_swapped(call):
    q, k = call.args[:2]
    return with_arguments(call, q=k, k=q) if q.shape == k.shape else None


def _misread(x):
    """An array of (B, T, H, D) in memory, taken for (B, H, T, D)."""
    b, h, t, d = x.shape
    return x.reshape(b, t, h, d).swapaxes(1, 2)


def _miswritten(x):
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape)


def _layout_of_inputs(call):
    if all(1 in x.shape[1:3] for x in call.args[:3]):
        return None
    return with_arguments(call, **{n: _misread(x) for n, x in zip("qkv", call.args)})


def _layout_of_output(case, written):
    """It is written as it was read, or not."""
    return {"out": _miswritten(case.values["out"])} if written else {}


def _output(change, back, applies):
    """A linear change of the output, with the gradients of what is returned, or of what should be."""

    def answer(case, how):
        *parameter, chained = how if isinstance(how, tuple) else (how,)
        out = case.values["out"]
        if not applies(out, case.call, *parameter):
            return None
        grads = {}
        if chained and case.dout is not None:
            grads = reference(case.call, back(case.dout, case.call, *parameter))
        return grads | {"out": change(out, case.call, *parameter), "lse": case.values["lse"]}

    return answer


def _cut(out, call):
    return out * (np.arange(out.shape[3]) < call.args[0].shape[3])


def _without_last_queries(out, call, tile):
    queries = out.shape[2]
    return out * (np.arange(queries) < queries // tile * tile)[:, None]


def _softmax_over_queries(case):
    s = steps(case.call)
    top = s.logits.max(axis=-2, keepdims=True, initial=-INF)
    e = np.exp(s.logits - np.where(np.isneginf(top), 0, top))
    total = e.sum(axis=-2, keepdims=True)
    return {"out": (e / np.where(total == 0, 1, total) * s.kept) @ s.v}


# --- sinks and dropout ------------------------------------------------------------------------------------------


def _sinks(change):
    def changed(call):
        sinks = arguments(call)[4]
        sinks = None if sinks is None else change(sinks)
        return None if sinks is None else with_arguments(call, sinks=sinks)

    return changed


def _sinks_ignored(call):
    return None if arguments(call)[4] is None else with_arguments(call, sinks=None)


def _sink_counted(call, times):
    return _sinks(lambda s: s + math.log(times))(call)


def _plus_one(call):
    return with_arguments(call, sinks=np.zeros(call.args[0].shape[1])) if arguments(call)[4] is None else None


def _keep(change):
    def changed(call):
        keep = call.options.get("dropout_keep")
        keep = None if keep is None else change(keep)
        return None if keep is None else with_options(call, dropout_keep=keep)

    return changed


def _dropout_ignored(call):
    return with_options(call, dropout_keep=None, dropout_p=0.0) if given(call, "dropout_keep") else None


def _dropout_unscaled(call):
    return with_options(call, dropout_p=0.0) if call.options.get("dropout_p") else None


def _dropout_scaled_by_p(call):
    p = call.options.get("dropout_p")
    return with_options(call, dropout_p=1 - p) if p and p != 0.5 else None


def _dropout_as_mask(call, scaled):
    """What is dropped does not count; what is kept is divided by 1 - p, or not."""
    keep = call.options.get("dropout_keep")
    if keep is None:
        return None
    return with_condition(call, keep, **({} if scaled else {"dropout_keep": None, "dropout_p": 0.0}))


def _dropout_in_backward(case, where):
    """Dropout, or its factor alone, missing in dP, in dv or in both."""
    missing, place = where
    keep = case.call.options.get("dropout_keep")
    if case.dout is None or keep is None:
        return None
    factor = rules_of(case.call).keep_factor
    if missing == "scale" and factor == 1:
        return None
    wrong = {"scale": keep * 1.0, "mask": factor, "both": 1.0}[missing]
    right = keep * factor
    return pulled_back(
        *(case.call, case.dout, case.values["out"], case.values["lse"]),
        **{"in_dp": right if place == "dv" else wrong, "in_dv": right if place == "dp" else wrong},
    )


# --- what is returned -------------------------------------------------------------------------------------------


def _lse(change):
    def answer(case):
        lse = case.values["lse"]
        return {"lse": np.where(np.isneginf(lse), lse, change(lse, case))}

    return answer


def _top(case):
    s = steps(case.call)
    top = s.logits.max(axis=-1, initial=-INF)
    top = top if s.sinks is None else np.maximum(top, s.sinks[:, None])
    return np.where(np.isneginf(top), 0, top)


def _lse_without_sink(case):
    if arguments(case.call)[4] is None:
        return None
    return {"lse": reference(with_arguments(case.call, sinks=None))["lse"]}


def _lse_of_empty_row(case, value):
    lse = case.values["lse"]
    return {"lse": np.where(np.isneginf(lse), value, lse)} if np.isneginf(lse).any() else None


def _unnormalised(case):
    lse = case.values["lse"]
    total = np.where(np.isneginf(lse), 1, np.exp(lse - _top(case)))
    return {"out": case.values["out"] * total[..., None]}


def _empty_row(rule):
    def change(call):
        if exact(call.options.get("convention")).fully_masked == rule or not empty_rows(call).any():
            return None
        return with_convention(call, fully_masked=rule, mask_value=-INF)

    return change


def _empty_row_mean(call, _):
    return with_convention(call, mask_value=-1e30) if empty_rows(call).any() else None


def _lse_of_mean(case, value):
    """That of -inf, or of the finite value that was the mask's."""
    empty = empty_rows(case.call)
    keys = case.call.args[1].shape[2]
    return {"lse": np.where(empty, value + math.log(max(1, keys)), case.values["lse"])}


# --- tiles with a running maximum ---------------------------------------------------------------------------------


def _tiled(case, how):
    """Weights relative to the maximum so far, and to the last; and e to how much it moved in the key's own tile."""
    tile, backwards = how
    s = steps(case.call)
    keys = s.logits.shape[-1]
    if not keys:
        return None
    starts = range(0, keys, tile)
    tops = np.maximum.reduceat(s.logits, list(starts), axis=-1)
    tops = tops[..., ::-1] if backwards else tops
    first = np.broadcast_to(-INF if s.sinks is None else s.sinks[:, None, None], (*tops.shape[:3], 1))
    running = np.maximum.accumulate(np.concatenate([first, tops], axis=-1), axis=-1)
    running, before = running[..., 1:], running[..., :-1]
    last = running[..., -1:]
    if backwards:
        running, before = running[..., ::-1], before[..., ::-1]
    of_key = np.arange(keys) // tile
    so_far, earlier = running[..., of_key], before[..., of_key]
    safe = np.where(np.isneginf(so_far), 0, so_far)
    e = np.exp(s.logits - safe)
    end = np.where(np.isneginf(last), 0, last)
    sink = 0 if s.sinks is None else np.exp(s.sinks[:, None, None] - end)
    previous = before[..., :1] if backwards else before[..., -1:]
    return s, e, np.exp(s.logits - end), np.exp(earlier - safe), end, sink, previous


def _not_rescaled(what):
    def answer(case, how):
        found = _tiled(case, how)
        if found is None:
            return None
        s, e, right, moved, end, sink, previous = found
        if what == "lse":
            lse = case.values["lse"]
            return {"lse": np.where(np.isneginf(lse), -INF, lse + (previous - end)[..., 0])}
        total = right.sum(axis=-1, keepdims=True) + sink
        if what in ("total", "both"):
            total = e.sum(axis=-1, keepdims=True) + (0 if s.sinks is None else 1)
        total = np.where(total == 0, 1, total)
        weights = {"total": right, "late": right * moved}.get(what, e)
        out = (weights * s.kept) @ s.v / total
        lse = np.where(np.isneginf(case.values["lse"]), -INF, (end + np.log(total))[..., 0])
        return {"out": out, "lse": lse}

    return answer


# --- backward, from out and lse as kernels do it ----------------------------------------------------------------


@np.errstate(all="ignore")
def pulled_back(call, dout, out, lse, *, change_d=None, bent=True, in_dp=None, in_dv=None, in_dq=1.0):
    """Gradients {name: array} from probabilities e^{logits - lse} and D = sum dout out, whatever lse and out are."""
    s = steps(call)
    order, i = s.rules.convention.gqa_order, np.arange(s.q.shape[2])
    k, v, bias = arguments(call)[1:4]
    dout = only_real(dout, i, s.rules, 0)
    saved = np.where(np.isneginf(lse), INF, lse)[..., None]
    p = np.exp(s.logits - saved)
    d = (dout * out).sum(axis=-1, keepdims=True)
    d = d if change_d is None else change_d(d)
    dp = dout @ s.v.swapaxes(-1, -2) * (s.kept if in_dp is None else in_dp)
    dproducts, dlogits = scores_backward(p * (dp - d), {}, s.uncapped if bent else None, s.seen, s.rules)
    grads = {
        "dq": s.rules.scale * ((dproducts * in_dq) @ s.k),
        "dk": from_heads(s.rules.scale * (dproducts.swapaxes(-1, -2) @ s.q), k.shape[1], order),
        "dv": from_heads((p * (s.kept if in_dv is None else in_dv)).swapaxes(-1, -2) @ dout, v.shape[1], order),
    }
    if bias is not None:
        grads["dattn_bias"] = shrink(np.broadcast_to(dlogits, (*s.q.shape[:3], k.shape[2])), bias.shape)
    if s.sinks is not None:
        grads["dsinks"] = -(np.exp(s.sinks[:, None, None] - saved) * d).sum(axis=(0, 2, 3))
    return grads


def _with_d(change):
    """Another D; the gradient of the sinks with it, or not."""

    def answer(case, sinks_too):
        if case.dout is None:
            return None
        grads = pulled_back(case.call, case.dout, case.values["out"], case.values["lse"], change_d=change)
        return {name: g for name, g in grads.items() if sinks_too or name != "dsinks"}

    return answer


def _d_of_next(case, tile):
    """Around the end of all queries, or of a tile of them."""

    def rolled(d):
        pieces = np.split(d, range(tile or d.shape[2], d.shape[2], tile or d.shape[2]), axis=2)
        return np.concatenate([np.roll(piece, -1, axis=2) for piece in pieces], axis=2)

    return _with_d(rolled)(case, True)


def _not_bent(case):
    if case.dout is None or rules_of(case.call).softcap is None:
        return None
    return pulled_back(case.call, case.dout, case.values["out"], case.values["lse"], bent=False)


def _bent_bias(case):
    """The gradient of the bias as if it had gone through the soft cap."""
    s = steps(case.call)
    if case.dout is None or s.uncapped is None or s.bias is None or s.rules.convention.softcap_after != "scale":
        return None
    slope = 1 - np.tanh(s.uncapped / s.rules.softcap) ** 2
    whole = _whole_bias(case)
    whole = case.values["dattn_bias"].reshape(slope.shape) if whole is None else whole
    return {"dattn_bias": shrink(whole * slope, s.bias.shape)}


def _unnormalised_dv(case, tile):
    """p relative to the largest of its row, or of its row in a tile, not to the sum."""
    if case.dout is None:
        return None
    s = steps(case.call)
    keys = s.logits.shape[-1]
    starts = list(range(0, keys, tile or max(1, keys)))
    tops = np.maximum.reduceat(s.logits, starts, axis=-1)[..., np.arange(keys) // (tile or max(1, keys))]
    p = np.where(np.isneginf(tops), 0, np.exp(s.logits - np.where(np.isneginf(tops), 0, tops)))
    order, shared = s.rules.convention.gqa_order, case.call.args[2].shape[1]
    return {"dv": from_heads((p * s.kept).swapaxes(-1, -2) @ case.dout, shared, order)}


def _keys_missed(case, tile):
    """dq misses the first tile of keys."""
    if case.dout is None:
        return None
    there = np.arange(case.call.args[1].shape[2]) >= tile
    return {"dq": pulled_back(case.call, case.dout, case.values["out"], case.values["lse"], in_dq=there)["dq"]}


def _gradients(*names, by):
    def answer(case, *parameter):
        if case.dout is None:
            return None
        factor = by(rules_of(case.call).scale, *parameter)
        return None if factor == 1 else {name: case.values[name] * factor for name in names}

    return answer


def _queries_dropped(which):
    """Backward leaves some queries out, of dk and dv alone or of dq too: a last partial tile, or the first tile."""

    def answer(case, how):
        tile, also_dq = how
        queries = case.call.args[0].shape[2]
        if case.dout is None or (which == "last" and not queries % tile):
            return None
        i = np.arange(queries)
        there = (i < queries // tile * tile if which == "last" else i >= tile)[:, None]
        grads = reference(case.call, case.dout * there)
        names = ("dk", "dv", "dattn_bias", "dsinks") if also_dq else ("dk", "dv")
        return {n: grads[n] for n in names if n in grads} | ({"dq": case.values["dq"] * there} if also_dq else {})

    return answer


# --- the table --------------------------------------------------------------------------------------------------

MISTAKES = (
    # the scale
    Mistake("scale_missing", "the scores are not scaled", _scale(lambda c, s: 1.0)),
    Mistake("scale_squared", "the scores are scaled twice", _scale(lambda c, s: s * s)),
    Mistake("scale_inverse", "the scores are divided by the scale", _scale(lambda c, s: 1 / s if s else None)),
    Mistake("scale_option_ignored", "the scale is always 1 / sqrt(D), whatever is asked for",
            _scale(lambda c, s: 1 / math.sqrt(max(1, c.args[0].shape[3])) if given(c, "scale") else None)),
    Mistake("scale_root_missing", "the scale is 1 / D", _default_scale(lambda c: c.args[0].shape[3] ** 2)),
    Mistake("scale_from_value_width", "the scale is from the width of the values: 1 / sqrt(E)",
            _default_scale(lambda c: c.args[2].shape[3])),
    Mistake("scale_from_key_count", "the scale is from the number of keys: 1 / sqrt(K)",
            _default_scale(lambda c: c.args[1].shape[2])),
    Mistake("scale_from_model_width", "the scale is from the width of all heads: 1 / sqrt(H D)",
            _default_scale(lambda c: c.args[0].shape[1] * c.args[0].shape[3])),
    Mistake("scale_from_padded_width", "the scale is from D as padded to a multiple of {}", _padded_width,
            parameters=(8, 16, 32, 64, 128)),
    Mistake("scale_negative", "the scores have the opposite sign", _scale(lambda c, s: -s)),
    # which keys take part
    Mistake("causal_top_left", "causal masking is aligned at the top left", _causal_top_left),
    Mistake("causal_bottom_right", "causal masking is aligned at the bottom right", _causal_bottom_right,
            parameters=(False, True)),
    Mistake("causal_ignored", "causal masking is missing", _causal_ignored),
    Mistake("causal_sees_one_ahead", "a query sees the key after its own position", _causal(lambda j, p: j <= p + 1)),
    Mistake("causal_hides_itself", "a query does not see the key at its own position", _causal(lambda j, p: j < p)),
    Mistake("causal_reversed", "causal masking hides the past, not the future", _causal(lambda j, p: j >= p)),
    Mistake("causal_by_groups", "causal masking is done in groups of {} keys: what is left of the group leaks",
            _causal_by_groups, parameters=(2, 4, 8, 16, 32, 64, 128)),
    Mistake("causal_from_padded_keys", "bottom_right counts the padding, not kv_seqlens", _from_padded_keys),
    Mistake("window_left_one_more", "the window is one longer to the left", _window("left", 1)),
    Mistake("window_left_one_less", "the window is one shorter to the left", _window("left", -1)),
    Mistake("window_right_one_more", "the window is one longer to the right", _window("right", 1)),
    Mistake("window_right_one_less", "the window is one shorter to the right", _window("right", -1)),
    Mistake("window_ignored", "the window is ignored", _no_option("window")),
    Mistake("window_left_ignored", "the left end of the window is ignored", _window("left", None)),
    Mistake("window_right_ignored", "the right end of the window is ignored", _window("right", None)),
    Mistake("window_swapped", "left and right of the window are swapped", _window_swapped),
    Mistake("window_without_offset", "the window's left end counts from the index, not the position",
            _window_without_offset),
    Mistake("q_offset_ignored", "q_offset is ignored", _q_offset_number_ignored, parameters=(False, True)),
    Mistake("q_offset_of_first_item", "q_offset of the first item is used for all", _q_offset_of_first_item),
    Mistake("kv_seqlens_ignored", "kv_seqlens is ignored", _kv_seqlens(lambda n: None), parameters=(False, True)),
    Mistake("kv_seqlens_of_first_item", "kv_seqlens of the first item is used for all",
            _kv_seqlens(lambda n: np.full_like(n, n[0])), parameters=(False, True)),
    Mistake("kv_seqlens_one_more", "one key beyond kv_seqlens takes part", _kv_seqlens(lambda n: n + 1),
            parameters=(False, True)),
    Mistake("kv_seqlens_one_less", "the last key within kv_seqlens does not take part", _kv_seqlens(lambda n: n - 1),
            parameters=(False, True)),
    Mistake("q_seqlens_ignored", "q_seqlens is ignored", _no_option("q_seqlens")),
    Mistake("mask_inverted", "attn_mask is read the other way: True hides", _mask(np.logical_not)),
    Mistake("mask_ignored", "attn_mask is ignored", _no_option("attn_mask")),
    Mistake("mask_gives_way_to_causal", "attn_mask is ignored where it is causal too", _mask_gives_way),
    Mistake("mask_of_first_item", "attn_mask of the first item is used for all", _mask(lambda m: first_of(m, -4))),
    Mistake("mask_of_first_head", "attn_mask of the first head is used for all", _mask(lambda m: first_of(m, -3))),
    Mistake("mask_of_first_query", "attn_mask of the first query is used for all", _mask(lambda m: first_of(m, -2))),
    Mistake("mask_transposed", "attn_mask is transposed", _mask(_transposed)),
    # the soft cap and the bias
    Mistake("softcap_ignored", "the soft cap is missing", _no_option("softcap")),
    Mistake("softcap_after_bias", "the soft cap comes after the bias", _softcap_after("bias")),
    Mistake("softcap_after_mask", "the soft cap comes after the mask, and lets masked keys in again",
            _softcap_after("mask")),
    Mistake("softcap_not_rescaled", "the soft cap is tanh(s / softcap), not multiplied by softcap",
            _softcap_not_rescaled),
    Mistake("softcap_not_divided", "the soft cap is softcap tanh(s), not divided by softcap", _softcap_not_divided),
    Mistake("softcap_derivative_missing", "backward misses the derivative of the soft cap", None, _not_bent),
    Mistake("softcap_slope_in_bias", "the gradient of attn_bias went through the soft cap", None, _bent_bias),
    Mistake("bias_ignored", "attn_bias is ignored", _bias(_ignored_bias)),
    Mistake("bias_scaled", "attn_bias is scaled like the scores", _bias(_scaled_bias)),
    Mistake("bias_subtracted", "attn_bias is subtracted", _bias(lambda b, c: -b if np.isfinite(b).all() else None)),
    Mistake("bias_of_first_item", "attn_bias of the first item is used for all", _bias(lambda b, c: first_of(b, -4))),
    Mistake("bias_of_first_head", "attn_bias of the first head is used for all", _bias(lambda b, c: first_of(b, -3))),
    Mistake("bias_of_first_query", "attn_bias of the first query is used for all", _bias(lambda b, c: first_of(b, -2))),
    Mistake("bias_gradient_not_reduced", "the gradient of attn_bias is not summed over what was stretched", None,
            _bias_not_reduced, tuple((k, a) for k in ("first", "last", "mean") for a in (None, 0, 1, 2, 3))),
    Mistake("bias_gradient_scaled", "the gradient of attn_bias is scaled like the scores", None,
            lambda c: _gradients("dattn_bias", by=lambda s: s)(c) if "dattn_bias" in c.values else None),
    # heads, items, layouts
    Mistake("heads_tiled", "query head h uses shared head h % G, not h // (H / G)", _heads_tiled),
    Mistake("heads_first_only", "all query heads use the first shared head", _first_head),
    Mistake("heads_tiled_in_backward", "dk and dv are summed over the wrong query heads", None, _tiled_back),
    Mistake("shared_heads_not_summed", "dk and dv are {} over a group of query heads, not the sum", None,
            _shared_not_summed, ("the first", "the last", "the mean")),
    Mistake("keys_of_first_item", "all items use the keys of the first", _first_item("k")),
    Mistake("values_of_first_item", "all items use the values of the first", _first_item("v")),
    Mistake("keys_and_values_of_first_item", "all items use the keys and values of the first", _first_item("k", "v")),
    Mistake("keys_of_next_head", "each head uses the keys of the next", _rolled_heads("k"), None, (False, True)),
    Mistake("values_of_next_head", "each head uses the values of the next", _rolled_heads("v"), None, (False, True)),
    Mistake("keys_as_values", "the keys are used as values", _one_for_other("v", "k")),
    Mistake("values_as_keys", "the values are used as keys", _one_for_other("k", "v")),
    Mistake("keys_as_queries", "the keys are used as queries", _one_for_other("q", "k")),
    Mistake("queries_as_keys", "the queries are used as keys", _one_for_other("k", "q")),
    Mistake("q_and_k_swapped", "queries and keys are swapped", _q_and_k_swapped),
    Mistake("softmax_over_queries", "the softmax is over the queries, not the keys", None, _softmax_over_queries),
    Mistake("last_feature_dropped", "the last feature of q and k is left out", _last_feature_dropped),
    Mistake("values_cut_to_query_width", "features of the output beyond D stay zero", None,
            _output(_cut, _cut, lambda out, c: out.shape[3] > c.args[0].shape[3]), (False, True)),
    Mistake("out_not_transposed", "heads and queries are not swapped back in the output", None,
            _output(lambda x, c: _miswritten(x), lambda x, c: _misread(x), lambda x, c: 1 not in x.shape[1:3]),
            (False, True)),
    Mistake("layout_mistaken", "(B, H, T, D) is read as (B, T, H, D)", lambda c, w: _layout_of_inputs(c),
            _layout_of_output, (False, True)),
    # sinks, dropout
    Mistake("sink_ignored", "the sinks are ignored", _sinks_ignored),
    Mistake("sink_is_zero", "the sinks are zero, whatever they are", _sinks(np.zeros_like)),
    Mistake("sink_subtracted", "the sinks have the opposite sign", _sinks(np.negative)),
    Mistake("sink_of_first_head", "all heads have the sink of the first", _sinks(lambda s: first_of(s, -1))),
    Mistake("sink_counted_again", "the sink counts {} times: once in every part of the keys", _sink_counted,
            parameters=(2, 3, 4, 8)),
    Mistake("one_added_to_sum", "the softmax has one added to its sum", _plus_one),
    Mistake("dropout_ignored", "dropout is missing", _dropout_ignored),
    Mistake("dropout_scale_missing", "dropout does not divide by 1 - p", _dropout_unscaled),
    Mistake("dropout_scaled_by_p", "dropout divides by p, not 1 - p", _dropout_scaled_by_p),
    Mistake("dropout_inverted", "dropout keeps what it should drop", _keep(np.logical_not)),
    Mistake("dropout_as_mask", "what is dropped does not count in the softmax", _dropout_as_mask,
            parameters=(False, True)),
    Mistake("dropout_of_first_item", "dropout of the first item is used for all", _keep(lambda m: first_of(m, -4))),
    Mistake("dropout_of_first_head", "dropout of the first head is used for all", _keep(lambda m: first_of(m, -3))),
    Mistake("dropout_scale_missing_in_backward", "backward does not divide by 1 - p", None, _dropout_in_backward,
            (("scale", "both"), ("scale", "dp"), ("scale", "dv"))),
    Mistake("dropout_missing_in_dv", "dv misses the dropout", None, _dropout_in_backward,
            (("mask", "dv"), ("both", "dv"))),
    Mistake("dropout_missing_in_dp", "the gradient of the probabilities misses the dropout", None,
            _dropout_in_backward, (("mask", "dp"), ("both", "dp"))),
    # lse
    Mistake("lse_base_2", "lse has base 2", None, _lse(lambda lse, c: lse / math.log(2))),
    Mistake("lse_without_max", "lse is the logarithm of the sum without the maximum", None,
            _lse(lambda lse, c: lse - _top(c))),
    Mistake("lse_is_max", "lse is the maximum alone", None, _lse(lambda lse, c: _top(c))),
    Mistake("lse_of_previous_max", "lse has the maximum before the last tile (of {} keys)", None, _not_rescaled("lse"),
            tuple((t, b) for t in TILES for b in (False, True))),
    Mistake("lse_without_sink", "lse does not count the sink", None, _lse_without_sink),
    Mistake("lse_without_log", "lse is the sum, not its logarithm", None, _lse(lambda lse, c: np.exp(lse))),
    Mistake("lse_negative", "lse has the opposite sign", None, _lse(lambda lse, c: -lse)),
    Mistake("lse_of_empty_row", "lse of a row without keys is {}", None, _lse_of_empty_row,
            (INF, 0.0, math.nan, *MASK_VALUES[4:])),
    # backward
    Mistake("d_missing", "backward does not subtract D = sum dout out", None, _with_d(np.zeros_like), (True, False)),
    Mistake("d_added", "backward adds D = sum dout out", None, _with_d(np.negative), (True, False)),
    Mistake("d_of_next_row", "backward subtracts D of the next query", None,
            _d_of_next, (None, *TILES)),
    Mistake("d_of_first_head", "backward subtracts D of the first head", None,
            _with_d(lambda d: np.broadcast_to(d[:, :1], d.shape)), (True, False)),
    Mistake("dk_scale_missing", "dk misses the scale", None, _gradients("dk", by=lambda s: 1 / s)),
    Mistake("dq_scale_missing", "dq misses the scale", None, _gradients("dq", by=lambda s: 1 / s)),
    Mistake("dq_dk_scale_missing", "dq and dk miss the scale", None, _gradients("dq", "dk", by=lambda s: 1 / s)),
    Mistake("dk_scale_twice", "dk is scaled twice", None, _gradients("dk", by=lambda s: s)),
    Mistake("dq_scale_twice", "dq is scaled twice", None, _gradients("dq", by=lambda s: s)),
    Mistake("dq_dk_scale_twice", "dq and dk are scaled twice", None, _gradients("dq", "dk", by=lambda s: s)),
    *(
        Mistake(f"{'_'.join(names)}_of_base_2", f"{' and '.join(names)} {verb} {{}} times what is right: exp2 for exp",
                None, _gradients(*names, by=lambda s, f: f), (math.log(2), 1 / math.log(2)))
        for names, verb in ((("dk",), "is"), (("dq",), "is"), (("dq", "dk"), "are"))
    ),
    Mistake("dv_not_normalised", "dv is of weights relative to the largest, not to the sum", None, _unnormalised_dv,
            (None, *TILES)),
    # tiles, and loops that end wrong
    Mistake("last_key_dropped", "the last key is left out", _last_dropped),
    Mistake("first_key_dropped", "the first key is left out", _first_dropped),
    Mistake("last_tile_dropped", "the last, partial tile of {} keys is left out", _last_tile_dropped, None, TILES),
    Mistake("first_tile_twice", "the first tile of {} keys counts twice", _first_tile_twice, None, TILES),
    Mistake("padding_as_zero_scores", "a partial tile of {} keys is filled with scores of zero, which count", _padding,
            _padding_answer, tuple((t, m) for t in (8, *TILES, 256) for m in (False, True))),
    Mistake("accumulator_not_rescaled", "the running output is not rescaled where the maximum moves (tiles of {})",
            None, _not_rescaled("out"), tuple((t, b) for t in TILES for b in (False, True))),
    Mistake("total_not_rescaled", "the running sum is not rescaled where the maximum moves (tiles of {})",
            None, _not_rescaled("total"), tuple((t, b) for t in TILES for b in (False, True))),
    Mistake("nothing_rescaled", "neither output nor sum is rescaled where the maximum moves (tiles of {})",
            None, _not_rescaled("both"), tuple((t, b) for t in TILES for b in (False, True))),
    Mistake("accumulator_rescaled_late", "the running output is rescaled after a tile is added, not before (of {})",
            None, _not_rescaled("late"), tuple((t, b) for t in TILES for b in (False, True))),
    Mistake("key_shifted", "scores are those of the key before or after", _moved("k"), None, SHIFTS),
    Mistake("value_shifted", "values are those of the key before or after", _moved("v"), None, SHIFTS),
    Mistake("last_query_tile_dropped", "backward leaves the last, partial tile of {} queries out", None,
            _queries_dropped("last"), tuple((t, a) for t in TILES for a in (False, True))),
    Mistake("first_query_tile_dropped", "backward leaves the first tile of {} queries out", None,
            _queries_dropped("first"), tuple((t, a) for t in TILES for a in (False, True))),
    Mistake("dq_misses_first_keys", "dq misses the first tile of {} keys", None, _keys_missed, TILES),
    Mistake("last_queries_zero", "the last, partial tile of {} queries has no output", None,
            _output(_without_last_queries, _without_last_queries, lambda x, c, tile: x.shape[2] % tile),
            tuple((t, chained) for t in TILES for chained in (False, True))),
    # the softmax
    Mistake("softmax_base_2", "the softmax has base 2, without log2(e) in the scale", lambda c: _base(c, math.log(2)),
            lambda c: _base_answer(c, math.log(2))),
    Mistake("softmax_log2e_twice", "log2(e) is in the scale twice", lambda c: _base(c, 1 / math.log(2)),
            lambda c: _base_answer(c, 1 / math.log(2))),
    Mistake("not_normalised", "the output is not divided by the sum of the softmax", None, _unnormalised),
    Mistake("empty_row_nan", "a row without keys is NaN", _empty_row("nan")),
    Mistake("empty_row_zero", "a row without keys is zero", _empty_row("zero")),
    Mistake("empty_row_mean", "a row without keys is the mean of the values", _empty_row_mean, _lse_of_mean,
            (-INF, 0.0, *MASK_VALUES)),
    Mistake("mask_value_finite", "what is masked has the score {}, not -inf", _mask_value,
            parameters=tuple((value, added) for value in MASK_VALUES for added in (False, True))),
)  # fmt: skip
