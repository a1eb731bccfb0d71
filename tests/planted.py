r"""Bugs planted in emulated attention kernels, each as it is made: what the power of the judge is measured on.

    forward, backward = kernel(ARITHMETICS["bf16_flash"], fault="causal_ignored")

A fault changes some Hooks of tests.emulated. Its kind is "structural" (another function is computed), "precision" (the
right one, with larger errors than were promised) or "range" (wrong only for extreme numbers, NaN or infinity).
`diagnosis` names what the judge's diagnosis should say, where it has a name for it. "The storage format" is that of the
output, or bfloat16 in a kernel that stores float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refattn.oracle.arithmetic import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32, FP8_ACCUMULATOR, TFLOAT32, round_to
from tests import emulated
from tests.emulated import INF, Hooks, dropped

KINDS = "structural", "precision", "range"
FAULTS = {}
HELD_OUT = {}  # written later, by heart, and never tuned: no rule, family or name was made with them in mind


class Fault(NamedTuple):
    name: str
    kind: str
    words: str
    diagnosis: Any  # a name in the table of diagnoses, several of them, or None
    build: Callable  # from the right Hooks to the wrong ones


def kernel(arithmetic, algorithm="flash", fault=None, **sizes):
    """(forward, backward) of tests.emulated, with a fault, or the name of one; or without."""
    fault = (FAULTS | HELD_OUT)[fault] if isinstance(fault, str) else fault
    return emulated.kernel(arithmetic, algorithm, None if fault is None else fault.build(Hooks()), **sizes)


# --- what a line of the table needs ------------------------------------------------------------------------------


def _changed(**options):
    """Other arguments or options, each a function of all of them that were given."""
    return lambda given, size: given | {name: change(given) for name, change in options.items()}


def _aligned(names, change):
    """Another q_offset where it is one of these."""

    def offset(given):
        named = given["q_offset"] is None or isinstance(given["q_offset"], str)
        return change(given) if named and given["q_offset"] in names else given["q_offset"]

    return _changed(q_offset=offset)


def _where(name, change):
    """Another condition on which keys take part, where that one is in use; None: no condition."""

    def conditions(conditions, call):
        if name not in conditions:
            return conditions
        rest = {other: x for other, x in conditions.items() if other != name}
        return rest if change is None else rest | {name: change(conditions[name], call)}

    return conditions


def _in_phase(phase, change):
    return lambda x, at: change(x, at) if at.run.phase == phase else x


def _low(a):
    """The format that a kernel might wrongly use inside: of its output, bfloat16 where that is float32."""
    return a.out if a.out.precision < FLOAT32.precision else BFLOAT16


def _rounded(*names):
    return {"formats": dict.fromkeys(names, lambda a: (_low(a), False))}


def _truncated(name, own):
    """Cast toward zero, not to nearest, to the format that the Arithmetic has there, or a low one."""
    return {"formats": {name: lambda a: (_narrow(own(a), a), True)}}


def _narrow(form, a):
    return _low(a) if form is None or form.precision >= FLOAT32.precision else form


def _accumulated(*names):
    return {"accumulators": dict.fromkeys(names, _low)}


def _empty(at):
    """Queries of the tile that attend to nothing."""
    seen = at.run.problem.seen
    return np.zeros((1, 1, 1, 1), bool) if seen is None else ~seen[..., at.i, :].any(axis=-1, keepdims=True)


def _first(x, axis):
    """The first index of an axis, as long as the axis was."""
    if x is None or x.ndim < -axis:
        return x
    return np.broadcast_to(np.take(x, [0], axis=axis), x.shape)


def _next(j, call):
    return np.minimum(j + 1, call.j[-1])


def _one_entry(causal, call):
    """One query sees one key of its future."""
    row = len(call.i) // 2
    causal = np.broadcast_to(causal, np.broadcast_shapes(causal.shape, (len(call.i), len(call.j)))).copy()
    causal[..., row, :] |= call.j == call.positions[..., row, :] + 1
    return causal


def _only_first_shared(x, heads):
    """The gradient of the first shared head, where all queries used it."""
    whole = np.zeros((len(x), heads, *x.shape[2:]), x.dtype)
    whole[:, 0] = x.sum(axis=1)
    return whole


def _of_group(x, heads, member):
    return x.reshape(len(x), heads, -1, *x.shape[2:])[:, :, member]


def _tiled_back(x, heads):
    return x.reshape(len(x), -1, heads, *x.shape[2:]).sum(axis=1)


def _last_of_stretched(x, shape):
    """What the last of the queries, heads or items wrote, not the sum over them."""
    x = x[(-1,) * (x.ndim - len(shape))]
    return x[tuple(slice(-1, None) if n == 1 else slice(None) for n in shape)]


def _padding(at):
    """How many keys are missing in the tile; none where something else hides what is beyond the last key."""
    return at.run.size - len(at.j) if at.run.problem.seen is None else 0


def _other_tile(x, name, at):
    """The key or value of the tile before the second, which was not loaded."""
    j = at.j - at.run.size
    return getattr(at.run.problem, name)[..., j, :] if at.n == 1 and j[0] >= 0 else x


def _half_rescaled(x, at):
    half = np.arange(x.shape[-1]) < x.shape[-1] // 2
    return np.where(half, at.running.sum_out, x)


def _ripple(x):
    """exp, off by up to 2^-12."""
    return np.exp(x) * (1 + 2.0**-12 * np.sin(500 * np.where(np.isfinite(x), x, 0))).astype(x.dtype)


def _fault(table, kind, name, words, diagnosis=None, /, **hooks):
    table[name] = Fault(name, kind, words, diagnosis, lambda right: right._replace(**hooks))


_structural, _precision, _range = (functools.partial(_fault, FAULTS, kind) for kind in KINDS)

# --- structural: which keys take part ----------------------------------------------------------------------------

_structural(
    *("causal_top_left", "the diagonal starts at the top left", "causal_top_left"),
    given=_aligned(["bottom_right"], lambda g: 0),
)
_structural(
    *("causal_bottom_right", "the diagonal ends at the bottom right", "causal_bottom_right"),
    given=_aligned([None, "top_left"], lambda g: "bottom_right"),
)
_structural("causal_ignored", "is_causal does nothing", "causal_ignored", conditions=_where("causal", None))
_structural(
    *("causal_sees_one_ahead", "a query sees the key after its own", "causal_sees_one_ahead"),
    conditions=_where("causal", lambda x, c: c.j <= c.positions + 1),
)
_structural(
    *("causal_hides_itself", "a query does not see its own key", "causal_hides_itself"),
    conditions=_where("causal", lambda x, c: c.j < c.positions),
)
_structural(
    *("causal_by_eights", "the diagonal is masked in groups of 8 keys: half a tile of 16 leaks", "causal_by_groups"),
    conditions=_where("causal", lambda x, c: c.j // 8 * 8 <= c.positions),
)
_structural(
    *("causal_leaks_one_entry", "one query sees one key of its future"), conditions=_where("causal", _one_entry)
)
_structural(
    *("causal_not_in_last_rows", "the last partial tile of 16 queries is not masked"),
    conditions=_where("causal", lambda x, c: x | (c.i >= len(c.i) // 16 * 16)[:, None]),
)
_structural(
    *("causal_skips_too_early", "tiles of 16 keys are skipped by where they start, not by where they end"),
    conditions=_where(
        "causal", lambda x, c: x & (c.j // 16 * 16 <= c.i[:, None] // 16 * 16 + c.positions - c.i[:, None])
    ),
)
_structural(
    *("causal_from_padded_keys", "bottom_right counts the padding of the keys", "causal_from_padded_keys"),
    given=_aligned(["bottom_right"], lambda g: g["k"].shape[2] - g["q"].shape[2]),
)
_structural("causal_not_in_backward", "backward is not masked", only="backward", conditions=_where("causal", None))
_structural(
    *("window_left_one_more", "the window is one longer to the left", "window_left_one_more"),
    conditions=_where("left", lambda x, c: c.j >= c.positions - c.left - 1),
)
_structural(
    *("window_left_one_less", "the window is one shorter to the left", "window_left_one_less"),
    conditions=_where("left", lambda x, c: c.j > c.positions - c.left),
)
_structural(
    *("window_right_one_more", "the window is one longer to the right", "window_right_one_more"),
    conditions=_where("right", lambda x, c: c.j <= c.positions + c.right + 1),
)
_structural(
    *("window_right_one_less", "the window is one shorter to the right", "window_right_one_less"),
    conditions=_where("right", lambda x, c: c.j < c.positions + c.right),
)
_structural("window_ignored", "window does nothing", "window_ignored", given=_changed(window=lambda g: None))
_structural(
    "window_left_ignored",
    "the left end of the window does nothing",
    "window_left_ignored",
    conditions=_where("left", None),
)
_structural(
    "window_right_ignored",
    "the right end of the window does nothing",
    "window_right_ignored",
    conditions=_where("right", None),
)
_structural(
    *("window_swapped", "left and right of the window are swapped", "window_swapped"),
    given=_changed(window=lambda g: g["window"] and g["window"][::-1]),
)
_structural(
    *(
        "window_without_offset",
        "the left end of the window is counted from the index, not the position",
        "window_without_offset",
    ),
    conditions=_where("left", lambda x, c: c.j >= c.i[:, None] - c.left),
)
_structural(
    *("q_offset_ignored", "a q_offset that is a number does nothing", "q_offset_ignored"),
    given=_changed(q_offset=lambda g: g["q_offset"] if isinstance(g["q_offset"], str) else None),
)
_structural(
    *("mask_inverted", "attn_mask says where a key does not take part", "mask_inverted"),
    conditions=_where("mask", lambda x, c: ~x),
)
_structural("mask_ignored", "attn_mask does nothing", "mask_ignored", conditions=_where("mask", None))
_structural(
    *("mask_of_first_item", "all items have the mask of the first", "mask_of_first_item"),
    given=_changed(attn_mask=lambda g: _first(g["attn_mask"], -4)),
)
_structural(
    *("mask_of_first_head", "all heads have the mask of the first", "mask_of_first_head"),
    given=_changed(attn_mask=lambda g: _first(g["attn_mask"], -3)),
)
_structural(
    *("mask_of_first_query", "all queries have the mask of the first", "mask_of_first_query"),
    given=_changed(attn_mask=lambda g: _first(g["attn_mask"], -2)),
)
_structural("mask_not_in_backward", "backward is not masked", only="backward", conditions=_where("mask", None))
_structural(
    *("mask_gives_way_to_causal", "attn_mask does nothing if is_causal", "mask_gives_way_to_causal"),
    given=_changed(attn_mask=lambda g: None if g["is_causal"] else g["attn_mask"]),
)
_structural(
    *("mask_not_for_one_query", "attn_mask does nothing where there is one query: a path for decoding"),
    given=_changed(attn_mask=lambda g: None if g["q"].shape[2] == 1 else g["attn_mask"]),
)
_structural(
    *("kv_seqlens_ignored", "kv_seqlens does nothing", "kv_seqlens_ignored"),
    given=_changed(kv_seqlens=lambda g: None),
)
_structural(
    *("kv_seqlens_of_first_item", "all items are as long as the first", "kv_seqlens_of_first_item"),
    given=_changed(kv_seqlens=lambda g: _first(g["kv_seqlens"], -1)),
)
_structural(
    *("kv_seqlens_one_more", "one key of the padding takes part", "kv_seqlens_one_more"),
    conditions=_where("lengths", lambda x, c: c.j <= c.lengths),
)
_structural(
    *("padding_as_zero_scores", "a partial tile is filled with keys of zeros, which take part"),
    "padding_as_zero_scores",
    values={
        "top": _in_phase("forward", lambda x, at: np.maximum(x, 0) if _padding(at) else x),
        "new_total": lambda x, at: x + _padding(at) * np.exp(-at.top) if _padding(at) else x,
    },
)

# --- structural: the logits --------------------------------------------------------------------------------------

_structural("scale_missing", "scores are not scaled", "scale_missing", given=_changed(scale=lambda g: 1.0))
_structural(
    *("scale_squared", "scores are scaled twice", "scale_squared"),
    given=_changed(scale=lambda g: 1 / g["q"].shape[3] if g["scale"] is None else g["scale"] ** 2),
)
_structural(
    *("scale_from_value_width", "the default scale is 1 / sqrt(E)", "scale_from_value_width"),
    given=_changed(scale=lambda g: g["v"].shape[3] ** -0.5 if g["scale"] is None else g["scale"]),
)
_structural(
    *("scale_from_key_count", "the default scale is 1 / sqrt(K)", "scale_from_key_count"),
    given=_changed(scale=lambda g: g["k"].shape[2] ** -0.5 if g["scale"] is None else g["scale"]),
)
_structural(
    "scale_option_ignored",
    "the scale is 1 / sqrt(D) always",
    "scale_option_ignored",
    given=_changed(scale=lambda g: None),
)
_structural("softcap_ignored", "softcap does nothing", "softcap_ignored", given=_changed(softcap=lambda g: None))
_structural(*("softcap_after_bias", "the bias is capped too", "softcap_after_bias"), cap_after="bias", bends_bias=True)
_structural("softcap_after_mask", "what is masked is capped", "softcap_after_mask", cap_after="mask", bends_bias=True)
_structural(
    *("softcap_not_rescaled", "tanh is not multiplied by softcap", "softcap_not_rescaled"),
    values={
        "capped": lambda x, at: x / at.run.problem.softcap,
        "slope": lambda x, at: x / at.run.problem.softcap,
    },
)
_structural(
    *("softcap_derivative_missing", "backward has no 1 - tanh^2", "softcap_derivative_missing"),
    values={"slope": lambda x, at: np.ones_like(x)},
)
_structural(
    *("softcap_derivative_of_capped", "the slope of the soft cap is that at the capped score"),
    values={"slope": lambda x, at: 1 - np.tanh(np.sqrt(1 - x)) ** 2},
)
_structural(
    "softcap_slope_in_bias",
    "the gradient of the bias goes through the soft cap",
    "softcap_slope_in_bias",
    bends_bias=True,
)
_structural(
    *("bias_ignored", "attn_bias does nothing", "bias_ignored"),
    values={"bias": lambda x, at: 0 * x, "dattn_bias": lambda x, at: 0 * x},
)
_structural(
    *("bias_scaled", "the bias is added before the scale", "bias_scaled"),
    values={
        "bias": lambda x, at: x * at.run.problem.scale,
        "dattn_bias": lambda x, at: x * at.run.problem.scale,
    },
)
_structural(
    *("bias_of_first_head", "all heads have the bias of the first", "bias_of_first_head"),
    given=_changed(attn_bias=lambda g: _first(g["attn_bias"], -3)),
)
_structural("bias_not_in_backward", "backward forgets the bias", only="backward", values={"bias": lambda x, at: 0 * x})
_structural(
    *("bias_gradient_not_reduced", "the gradient of a stretched bias is that of its last place, not the sum"),
    *("bias_gradient_not_reduced",),
    shrink=_last_of_stretched,
)
_structural(
    *("bias_gradient_scaled", "the gradient of the bias has the scale of the scores", "bias_gradient_scaled"),
    values={"dattn_bias": lambda x, at: x * at.run.problem.scale},
)
_structural(
    *("last_feature_dropped", "the product of q and k ends one feature early", "last_feature_dropped"),
    values={"key": lambda x, at: x * (np.arange(x.shape[-1]) < x.shape[-1] - 1)},
)
_structural(
    *("keys_of_next_head", "backward has the keys of the next head", "keys_of_next_head"),
    only="backward",
    values={"key": lambda x, at: np.roll(x, -1, axis=1)},
)

# --- structural: heads, items, sinks, dropout --------------------------------------------------------------------

_structural(
    *("heads_tiled", "query head h uses head h % G", "heads_tiled"),
    for_heads=lambda x, heads: np.tile(x, (1, heads // x.shape[1], 1, 1)),
    from_heads=_tiled_back,
)
_structural(
    *("heads_first_only", "all query heads use the first shared head", "heads_first_only"),
    for_heads=lambda x, heads: x if x.shape[1] == heads else x[:, :1].repeat(heads, axis=1),
    from_heads=_only_first_shared,
)
_structural(
    *("shared_heads_not_summed", "dk and dv are of one query head of each group", "shared_heads_not_summed"),
    from_heads=lambda x, heads: _of_group(x, heads, 0),
)
_structural(
    *("shared_heads_of_last", "dk and dv are what the last query head of a group wrote"),
    from_heads=lambda x, heads: _of_group(x, heads, -1),
)
_structural(
    *("shared_heads_averaged", "dk and dv are the mean over a group of query heads"),
    from_heads=lambda x, heads: x.reshape(len(x), heads, -1, *x.shape[2:]).mean(axis=2),
)
_structural(
    *("keys_of_first_item", "all items have the keys of the first", "keys_of_first_item"),
    given=_changed(k=lambda g: _first(g["k"], -4)),
)
_structural(
    *("value_as_wide_as_key", "output features beyond D stay zero", "values_cut_to_query_width"),
    values={"part_out": lambda x, at: x * (np.arange(x.shape[-1]) < at.run.problem.q.shape[-1])},
)
_structural(*("sink_ignored", "sinks do nothing", "sink_ignored"), values={"sink": lambda x, at: np.full_like(x, -INF)})
_structural("sink_is_zero", "every sink is 0", "sink_is_zero", values={"sink": lambda x, at: 0 * x})
_structural(
    "sink_of_first_head",
    "all heads have the sink of the first",
    "sink_of_first_head",
    given=_changed(sinks=lambda g: _first(g["sinks"], -1)),
)
_structural(
    "sink_in_every_part",
    "the sink counts once for each part of the keys",
    "sink_counted_again",
    algorithm="splitk",
    sink_in_every_part=True,
)
_structural("sink_gradient_negated", "dsinks has the other sign", values={"dsinks": lambda x, at: -x})
_structural(
    *("sink_gradient_of_first_item", "dsinks is that of the first item"),
    values={"terms_of_dsinks": lambda x, at: x * (np.arange(len(x)) == 0)[:, None, None, None]},
)
_structural(
    *("dropout_ignored", "dropout does nothing", "dropout_ignored"),
    given=_changed(dropout_keep=lambda g: None, dropout_p=lambda g: 0.0),
)
_structural(
    *("dropout_scale_missing", "no factor 1 / (1 - dropout_p)", "dropout_scale_missing"),
    given=_changed(dropout_p=lambda g: 0.0),
)
_structural(
    *("dropout_scale_missing_in_backward", "backward has no factor 1 / (1 - dropout_p)"),
    *("dropout_scale_missing_in_backward",),
    only="backward",
    given=_changed(dropout_p=lambda g: 0.0),
)
_structural(
    *("dropout_missing_in_dv", "dv is of the weights without dropout", "dropout_missing_in_dv"),
    values={"keep_in_dv": lambda x, at: np.ones_like(x), "keep_factor_in_dv": lambda x, at: 1.0},
)
_structural(
    *("dropout_missing_in_dweights", "the gradient of the weights is not dropped", "dropout_missing_in_dp"),
    values={"keep_in_dweights": lambda x, at: np.ones_like(x), "keep_factor_in_dweights": lambda x, at: 1.0},
)
_structural(
    *("dropout_before_the_sum", "what is dropped is not in the sum of the softmax either", "dropout_as_mask"),
    only="forward",
    values={"weights": lambda x, at: dropped(x, "keep", at)},
)
_structural(
    *("dropout_inverted", "dropout_keep says what is dropped", "dropout_inverted"),
    given=_changed(dropout_keep=lambda g: None if g["dropout_keep"] is None else ~g["dropout_keep"]),
)
_structural(
    *("dropout_of_first_item", "all items have the dropout of the first", "dropout_of_first_item"),
    given=_changed(dropout_keep=lambda g: _first(g["dropout_keep"], -4)),
)

# --- structural: the online softmax, lse and tiles ---------------------------------------------------------------

_structural(
    *("accumulator_not_rescaled", "the output is not rescaled when the maximum moves", "accumulator_not_rescaled"),
    values={"old_out": lambda x, at: at.running.sum_out},
)
_structural(
    *("total_not_rescaled", "the sum of the softmax is not rescaled when the maximum moves", "total_not_rescaled"),
    values={"old_total": lambda x, at: at.running.total},
)
_structural(
    *("one_row_not_rescaled", "one query of a tile is not rescaled when the maximum moves"),
    values={"old_total": lambda x, at: np.where((np.arange(x.shape[2]) == 3)[:, None], at.running.total, x)},
)
_structural(
    *("half_not_rescaled", "half of the output's features are not rescaled"), values={"old_out": _half_rescaled}
)
_structural(
    *("rescaled_after_adding", "the output is rescaled after the tile was added", "accumulator_rescaled_late"),
    values={"old_out": lambda x, at: at.running.sum_out, "sum_out": lambda x, at: x * at.shrink},
)
_structural(
    *("lse_base_2", "lse is a logarithm to base 2", "lse_base_2"),
    values={"lse": lambda x, at: x / math.log(2)},
    saves_lse=False,
)
_structural(
    *("lse_without_max", "lse is the logarithm of the sum alone", "lse_without_max"),
    values={"lse_top": lambda x, at: 0 * x},
    saves_lse=False,
)
_structural(
    *("lse_without_sink", "lse leaves the sink out", "lse_without_sink"),
    values={
        "lse": lambda x, at: x + np.log1p(-np.exp(at.run.problem.sinks - x)) if at.run.problem.sinks is not None else x
    },
    saves_lse=False,
)
_structural(
    *("lse_of_previous_max", "lse has the maximum before the last tile"),
    values={"lse_top": lambda x, at: at.running.before},
    saves_lse=False,
)
_structural(
    *("lse_of_empty_row_zero", "lse is 0 where a query attends to nothing", "lse_of_empty_row"),
    values={"lse": lambda x, at: np.where(np.isneginf(x), 0, x)},
    saves_lse=False,
)
_structural(
    *("empty_row_nan", "a query that attends to nothing gives NaN", "empty_row_nan"),
    values={
        "out": lambda x, at: np.where(_empty(at), np.nan, x),
        "weights": _in_phase("backward", lambda x, at: np.where(_empty(at), np.nan, x)),
    },
)
_structural(
    *("empty_row_mean", "a query that attends to nothing gives the mean of the values"),
    ("empty_row_mean", "mask_value_finite"),
    masked=-1e30,
    values={"weights": _in_phase("backward", lambda x, at: np.where(_empty(at), 1 / len(at.run.problem.j), x))},
)
_structural(
    *("last_tile_dropped", "a last partial tile of keys is left out", "last_tile_dropped"),
    key_tiles=lambda tiles, size: [j for j in tiles if len(j) == size],
)
_structural(
    *("last_query_tile_dropped", "backward leaves a last partial tile of queries out", "last_query_tile_dropped"),
    only="backward",
    query_tiles=lambda tiles, size: [i for i in tiles if len(i) == size],
)
_structural(
    "first_tile_twice",
    "the first tile of keys counts twice",
    "first_tile_twice",
    key_tiles=lambda tiles, size: tiles[:1] + tiles,
)
_structural(
    *("last_key_dropped", "the last key is left out", "last_key_dropped"),
    key_tiles=lambda tiles, size: [j for j in (j[j < sum(map(len, tiles)) - 1] for j in tiles) if len(j)],
)
_structural(
    *("key_shifted", "scores are those of the key after", "key_shifted"),
    values={"key": lambda x, at: at.run.problem.k[..., _next(at.j, at.run.problem), :]},
)
_structural(
    *("value_shifted", "values are those of the key after", "value_shifted"),
    values={"value": lambda x, at: at.run.problem.v[..., _next(at.j, at.run.problem), :]},
)
_structural(
    *("stale_value_tile", "the second tile of values is still the first"),
    only="forward",
    values={"value": lambda x, at: _other_tile(x, "v", at)},
)
_structural(
    *("stale_key_tile_in_backward", "the second tile of keys is still the first, in backward"),
    only="backward",
    values={"key": lambda x, at: _other_tile(x, "k", at)},
)
_structural(
    *("part_dropped", "the second part of split keys is not merged"),
    algorithm="splitk",
    values={"part_lse": lambda x, at: np.full_like(x, -INF) if at.n == 1 else x},
)
_structural(
    *("parts_averaged", "parts of split keys are averaged, whatever their sums"),
    algorithm="splitk",
    values={"share": lambda x, at: (x > 0).astype(x.dtype)},
)

# --- structural: backward ----------------------------------------------------------------------------------------

_structural(*("d_missing", "backward does not subtract D", "d_missing"), values={"d": lambda x, at: 0 * x})
_structural(
    *("d_of_next_row", "D is that of the query after", "d_of_next_row"),
    values={"d": lambda x, at: np.roll(x, -1, axis=2)},
)
_structural(
    "d_of_first_head", "D is that of the first head", "d_of_first_head", values={"d": lambda x, at: _first(x, -3)}
)
_structural("d_added", "D is added, not subtracted", "d_added", values={"d": lambda x, at: -x})
_structural(*("dk_scale_missing", "dk has no scale", "dk_scale_missing"), values={"scale_of_dk": lambda x, at: 1.0})
_structural(*("dq_scale_missing", "dq has no scale", "dq_scale_missing"), values={"scale_of_dq": lambda x, at: 1.0})
_structural(
    *("dk_scale_twice", "dk is scaled twice", "dk_scale_twice"),
    values={"dk": lambda x, at: x * at.run.problem.scale},
)
_structural(
    *("dq_scale_twice", "dq is scaled twice", "dq_scale_twice"),
    values={"dq": lambda x, at: x * at.run.problem.scale},
)
_structural(
    *("dv_of_unnormalised", "dv is of weights relative to the largest of a tile, not to the sum"),
    values={"probs_in_dv": lambda x, at: x / np.maximum(x.max(axis=-1, keepdims=True), FLOAT32.tiny)},
)
_structural(
    *("dk_dv_miss_first_queries", "dk and dv miss the first tile of queries"),
    values=dict.fromkeys(("sum_dk", "sum_dv"), lambda x, at: 0 * x if at.i[0] == 0 else x),
)
_structural(
    *("dq_misses_first_keys", "dq misses the first tile of keys"),
    values={"sum_dq": lambda x, at: 0 * x if at.n == 0 else x},
)

# --- precision ---------------------------------------------------------------------------------------------------

_precision(
    *("scale_off_by_1e-3", "the scale is off by 1e-3"),
    values={"scale": lambda x, at: x * (1 + 1e-3)},
)
_precision(
    *("scale_off_by_2e-4", "the scale is off by 2e-4"),
    values={"scale": lambda x, at: x * (1 + 2e-4)},
)
_precision("scale_low", "the scale is cast to the storage format", **_rounded("scale"))
_precision("probs_truncated", "P is truncated", **_truncated("probs", lambda a: a.probs))
_precision("out_truncated", "the output is truncated", **_truncated("out", lambda a: a.out))
_precision("dscores_truncated", "dS is truncated", **_truncated("dscores", lambda a: a.dscores))
_precision("dweights_truncated", "dP is truncated", **_truncated("dweights", lambda a: a.dprobs))
_precision("dq_truncated", "dq is truncated", **_truncated("dq", lambda a: a.grad))
_precision("probs_in_8_bits", "P is cast to e4m3", formats={"probs": lambda a: (FLOAT8_E4M3, False)})
_precision("out_accumulated_low", "the output is accumulated in the storage format", **_accumulated("out"))
_precision("scores_accumulated_low", "q k^T is accumulated in the storage format", **_accumulated("scores"))
_precision("dweights_accumulated_low", "dy v^T is accumulated in the storage format", **_accumulated("dweights"))
_precision("dq_accumulated_low", "dq is accumulated in the storage format", **_accumulated("dq"))
_precision("dk_accumulated_low", "dk is accumulated in the storage format", **_accumulated("dk"))
_precision("dv_accumulated_low", "dv is accumulated in the storage format", **_accumulated("dv"))
_precision("out_stored_per_tile", "the running output is kept in the storage format", **_rounded("sum_out"))
_precision("dk_dv_stored_per_tile", "running dk, dv are kept in the storage format", **_rounded("sum_dk", "sum_dv"))
_precision("dq_stored_per_tile", "the running dq is kept in the storage format", **_rounded("sum_dq"))
_precision("total_low", "the sum of the softmax is kept in the storage format", **_rounded("total"))
_precision("reciprocal_low", "1 / sum is cast to the storage format", **_rounded("reciprocal"))
_precision("shrink_low", "the factor of rescaling is cast to the storage format", **_rounded("shrink"))
_precision("weights_low", "exp is cast to the storage format", **_rounded("weights"))
_precision("below_low", "logits less their maximum are cast to the storage format", **_rounded("below"))
_precision("softmax_low", "the softmax is in the storage format", arithmetic=lambda a: a._replace(softmax=_low(a)))
_precision("exp_off_by_2^-12", "exp has an error of 2^-12", exp=_ripple)
_precision("log2e_1.44", "exp is 2^(1.44 x)", exp=lambda x: np.exp(x * x.dtype.type(1.44 * math.log(2))))
_precision("tanh_in_11_bits", "tanh has 11 bits", tanh=lambda x: round_to(np.tanh(x), TFLOAT32))
_precision("lse_low", "lse is stored in the storage format", **_rounded("lse"))
_precision("part_lse_low", "lse of parts is in the storage format", algorithm="splitk", **_rounded("part_lse"))
_precision("part_out_low", "parts are in the storage format", algorithm="splitk", **_rounded("part_out"))
_precision("scores_low", "scores are stored in the storage format", **_rounded("scores"))
_precision(
    "scaled_query_low",
    "q is scaled before its product",
    **_rounded("scaled_query"),
    arithmetic=lambda a: a._replace(scaled_query=_low(a)),
)
_precision(
    "operands_tf32",
    "operands are cast to TF32",
    arithmetic=lambda a: a._replace(operands=TFLOAT32, operands_truncate=True),
)
_precision("operands_bf16", "operands are cast to bfloat16, once", arithmetic=lambda a: a._replace(operands=BFLOAT16))
_precision(
    "accumulators_e8m13", "accumulators have 14 bits", arithmetic=lambda a: a._replace(accumulator=FP8_ACCUMULATOR)
)
_precision("accumulators_f16", "scores are accumulated in float16", accumulators={"scores": lambda a: FLOAT16})
_precision("d_low", "D is kept in the storage format", **_rounded("d"))
_precision("dweights_low", "dP is kept in the storage format", **_rounded("dweights"))
_precision("dscores_of_low_probs", "dS is of P as it was cast", **_rounded("weights_in_dlogits"))
_precision("dscores_in_8_bits", "dS is cast to e4m3", formats={"dscores": lambda a: (FLOAT8_E4M3, False)})
_precision(
    "dk_dv_of_head_low",
    "dk and dv of each query head are cast before they are summed",
    **_rounded("dk_of_head", "dv_of_head"),
)
_precision("saved_out_in_8_bits", "D is of an output in e4m3", formats={"saved_out": lambda a: (FLOAT8_E4M3, False)})

# --- range, NaN and infinity -------------------------------------------------------------------------------------

_range("mask_value_-1e4", "a masked score is -1e4", "mask_value_finite", masked=-1e4)
_range("mask_value_-20", "a masked score is -20", "mask_value_finite", masked=-20.0)
_range(*("max_from_zero", "the running maximum starts at 0"), values={"first_top": lambda x, at: np.maximum(x, 0)})
_range(
    *("max_from_-1e4", "the running maximum starts at -1e4"), values={"first_top": lambda x, at: np.maximum(x, -1e4)}
)
_range(
    *("max_not_subtracted", "exp of the logits as they are"),
    values={
        "shift": lambda x, at: 0 * x,
        "shrink": _in_phase("forward", lambda x, at: np.ones_like(x)),
        "first_total": lambda x, at: x if at.run.problem.sinks is None else x * np.exp(at.run.problem.sinks),
        "lse_top": lambda x, at: 0 * x,
    },
)
_range(
    *("far_below_skipped", "weights less than 2^-8 are left out"),
    values={"weights": _in_phase("forward", lambda x, at: np.where(x < 2.0**-8, 0, x))},
)
_range("logits_clipped", "logits are clipped at 50", values={"logits": lambda x, at: np.minimum(x, 50)})
_range(
    "dlogits_clipped", "the gradient of the logits is clipped at 1", values={"dlogits": lambda x, at: np.clip(x, -1, 1)}
)
_range(
    *("probs_flushed", "a weight below 2^-6, the smallest normal number of e4m3, is cast to 0"),
    values={"probs": lambda x, at: np.where(x < 2.0**-6, 0, x)},
)
_range(
    *("sink_without_max", "exp of the sink is added as it is, the maximum not subtracted"),
    values={
        "first_top": lambda x, at: np.full_like(x, -INF),
        "first_total": lambda x, at: 0 * x,
        "last_total": lambda x, at: x if at.run.problem.sinks is None else x + np.exp(at.run.problem.sinks),
    },
)
_range(
    "nan_score_hidden", "a score of NaN counts as -inf", values={"logits": lambda x, at: np.where(np.isnan(x), -INF, x)}
)
_range(
    "nan_out_zeroed",
    "an output of NaN becomes 0",
    values={"out": lambda x, at: np.nan_to_num(x, nan=0, posinf=INF, neginf=-INF)},
)
_range(
    "nan_reaches_next_row",
    "NaN and inf reach the query after",
    values={"out": lambda x, at: x + 0 * np.roll(x, 1, axis=2)},
)
_range("inf_becomes_largest", "an infinite score becomes 1e30", values={"logits": lambda x, at: np.minimum(x, 1e30)})
_range(
    *("empty_part_nan", "a part of split keys of which a query sees none is NaN"),
    algorithm="splitk",
    values={"part_out": lambda x, at: np.where(at.running.total == 0, np.nan, x)},
)

# --- held out ----------------------------------------------------------------------------------------------------


def _by_columns(mask):
    """A mask that is stored row by row, read column by column."""
    if mask is None or mask.ndim < 2:
        return mask
    *outer, queries, keys = mask.shape
    return np.reshape(mask, (*outer, keys, queries)).swapaxes(-1, -2)


def _cubic(x):
    """exp by a polynomial of degree 3 for the fraction of the power of 2: off by up to 9e-5."""
    power = np.where(np.isfinite(x), x, 0) * x.dtype.type(1 / math.log(2))
    whole = np.floor(power)
    f = power - whole
    y = np.ldexp(1 + f * (0.6951461 + f * (0.22756439 + f * 0.07711909)), whole.astype(int)).astype(x.dtype)
    return np.where(np.isfinite(x), y, np.exp(x))


def _small_moves(name):
    """Not rescaled where the maximum moved by less than 1/2."""
    return lambda x, at: np.where(at.top - at.running.top < 0.5, getattr(at.running, name), x)


_held_out = functools.partial(_fault, HELD_OUT)
_held_out(
    *("structural", "causal_by_index_in_tile", "the diagonal counts queries from the start of their tile of 16"),
    conditions=_where("causal", lambda x, c: c.j <= c.positions - c.i[:, None] + c.i[:, None] % 16),
)
_held_out(
    *("structural", "causal_gives_way_to_lengths", "is_causal does nothing where there is padding"),
    conditions=lambda conditions, call: {n: x for n, x in conditions.items() if n != "causal" or call.lengths is None},
)
_held_out(
    *("structural", "bottom_right_of_padded_tiles", "bottom_right is of lengths rounded up to tiles of 16"),
    given=_aligned(["bottom_right"], lambda g: -(-g["k"].shape[2] // 16) * 16 - -(-g["q"].shape[2] // 16) * 16),
)
_held_out(
    *("structural", "q_offset_negated", "a q_offset that is a number has the other sign"),
    given=_changed(
        q_offset=lambda g: (
            g["q_offset"] if (g["q_offset"] is None or isinstance(g["q_offset"], str)) else -np.asarray(g["q_offset"])
        )
    ),
)
_held_out(
    *("structural", "window_left_by_tiles", "the left end of the window is that of its tile of 8 keys"),
    conditions=_where("left", lambda x, c: c.j >= (c.positions - c.left) // 8 * 8),
)
_held_out(
    *("structural", "mask_read_by_columns", "attn_mask is read column by column"),
    given=_changed(attn_mask=lambda g: _by_columns(g["attn_mask"])),
)
_held_out(
    *("structural", "mask_not_in_last_word", "the last partial word of 32 keys of attn_mask is True"),
    conditions=_where("mask", lambda x, c: x | (c.j >= len(c.j) // 32 * 32)),
)
_held_out(
    *("structural", "bias_added_twice", "the bias is added twice"),
    values={"bias": lambda x, at: 2 * x, "dattn_bias": lambda x, at: 2 * x},
)
_held_out(
    *("structural", "sink_scaled", "sinks are scaled as scores are"),
    values={"sink": lambda x, at: x * at.run.problem.scale, "dsinks": lambda x, at: x * at.run.problem.scale},
)
_held_out(
    *("structural", "queries_of_next_head", "queries are those of the next head"),
    given=_changed(q=lambda g: np.roll(g["q"], -1, axis=1)),
)
_held_out(
    *("structural", "dropout_of_next_query_in_dv", "dv has the dropout of the query after"),
    values={"keep_in_dv": lambda x, at: np.roll(x, -1, axis=2)},
)
_held_out(
    *("structural", "small_moves_not_rescaled", "nothing is rescaled where the maximum moves by less than 1/2"),
    values={"old_out": _small_moves("sum_out"), "old_total": _small_moves("total")},
)
_held_out(
    *("structural", "dscores_of_second_tile_lost", "dq and dk miss the second tile of keys"),
    values={"dscores": lambda x, at: 0 * x if at.n == 1 else x},
)
_held_out("precision", "exp_cubic", "exp is a polynomial of degree 3", exp=_cubic)
_held_out(
    "precision", "saved_lse_f16", "backward reads lse in float16", formats={"saved_lse": lambda a: (FLOAT16, False)}
)
_held_out(
    *("range", "exponent_clamped", "exp of less than -20 is exp(-20), of what is masked too"),
    values={"below": lambda x, at: np.maximum(x, -20)},
)
