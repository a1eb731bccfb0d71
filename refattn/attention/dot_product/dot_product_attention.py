r"""Dot-product attention with every option of the field.

The textbook formula is scaled_dot_product. This file adds what frameworks and kernels added to it, each option under
its usual name, and says in one NamedTuple, `Convention`, what they answer where they never agreed.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.2.1, and for the rest:
soft-capping: Gemma Team, "Gemma 2", 2024 (arXiv:2408.00118); sinks: Xiao et al., "Efficient Streaming Language Models
with Attention Sinks", ICLR 2024 (arXiv:2309.17453); grouped heads: Ainslie et al., "GQA", EMNLP 2023
(arXiv:2305.13245).

Shapes
    B items, H heads of queries, G heads of keys and W of values (divisors of H), Q queries, K keys, D features of a
    query or key, E features of a value.

Forward, for query i and key j of one head, in this order
    s_ij = scale q_i . k_j                    "scaled"
    c_ij = softcap tanh(s_ij / softcap)       "softcapped"
    l_ij = c_ij + attn_bias_ij, and where j does not take part for i, mask_value      "biased", the logits
    z_i  = sum_j e^{l_ij} + e^{sink}          sinks have one number per head
    p_ij = e^{l_ij} / z_i                     "probs"
    y_i  = sum_j p_ij keep_ij / (1 - dropout_p) v_j
    lse_i = log z_i                           -inf for a query that attends to nothing

    Key j takes part for query i, which stands at position p = i + q_offset, if all of these hold:
        attn_mask_ij;   is_causal: j <= p;   window (left, right): p - left <= j <= p + right;   j < kv_seqlens
    Queries from q_seqlens on get zeros.

Backward, with a bar for "gradient of the loss with respect to"; gradients of lse and of the scores join in
    pbar_ij = ybar_i . v_j keep_ij / (1 - dropout_p),     vbar_j = sum_i p_ij keep_ij / (1 - dropout_p) ybar_i
    lbar_ij = p_ij (pbar_ij - sum_j pbar_ij p_ij + lsebar_i)
    sinkbar = sum_i e^{sink} / z_i (lsebar_i - sum_j pbar_ij p_ij)
    cbar_ij = lbar_ij where j takes part for i, 0 elsewhere;  attn_biasbar is the sum of it over what was stretched
    sbar_ij = cbar_ij (1 - tanh^2(s_ij / softcap))
    qbar_i  = scale sum_j sbar_ij k_j,        kbar_j = scale sum_i sbar_ij q_i

Choices
    attn_mask is True where the key takes part, as in torch's scaled_dot_product_attention. It has axes (Q, K), or
    (B, H, Q, K), each as long as there or 1; other ranks mean different things to different frameworks. It may also
    be a mask of refattn.masks. attn_bias is anything that NumPy stretches to (B, H, Q, K); -inf forbids.
    window counts keys to the left and right of the query's own position, inclusive; None in it is no limit.
    q_offset: "top_left" is 0; "bottom_right" puts the last query at the last key, (kv length) - (query length), of
    every item its own lengths; a number, or one per item, is the length of what a cache holds already.
    return_lse and return_scores ("scaled", "softcapped", "biased", "probs") make the output an Out; all of it has
    gradients. Options that are None are what the convention says: scale, 1 / sqrt(D); is_causal, False; q_offset, 0.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Ints, Shaped, expect, shaped
from refattn.elementwise import sigmoid

INF = math.inf
STAGES = ("scaled", "softcapped", "biased", "probs")


class Convention(NamedTuple):
    """What frameworks answer differently; refattn.oracle.conventions has a preset for each of them."""

    mask_op: str = "replace"  # or "add": then NaN and inf of a masked key stay in the logits
    mask_value: float | str = -INF  # a finite one makes an all-masked row the mean of V; "lowest" of the dtype
    fully_masked: str = "zero"  # for a row of -inf; "nan", as 0 / 0 gives; "zero_masked_only": 0 where no key takes
    # part, NaN where some do, at -inf; "zero_probs": 0 for all that is masked, whatever mask_value made of it
    masked_values: str = "multiply"  # by 0, which NaN survives; or "skip"
    softcap_after: str = "scale"  # or "bias", or "mask", which lets masked keys in again, at -softcap
    gqa_order: str = "repeat_interleave"  # query head h uses head h // (H / G); "tile": h % G
    softmax_precision: Any = None  # the dtype of logits and softmax, where it is not that of q
    scale: float | None = None  # the defaults of options; None is 1 / sqrt(D)
    is_causal: bool = False
    q_offset: int | str = "top_left"
    measured: str = ""  # with which version


CHOICES = {
    "mask_op": ("replace", "add"),
    "fully_masked": ("zero", "nan", "zero_masked_only", "zero_probs"),
    "masked_values": ("multiply", "skip"),
    "softcap_after": ("scale", "bias", "mask"),
    "gqa_order": ("repeat_interleave", "tile"),
}


class Rules(NamedTuple):
    """The options of one call, checked, with the convention's answers filled in."""

    scale: float
    softcap: float | None
    is_causal: bool
    offset: np.ndarray  # of the queries' positions: (1 or B, 1, 1, 1)
    left: float
    right: float
    query_lengths: np.ndarray | None  # (B, 1, 1, 1)
    key_lengths: np.ndarray | None
    keep_factor: float  # 1 / (1 - dropout_p)
    convention: Convention


class Out(NamedTuple):
    y: Shaped[Array, "B H Q E"]
    lse: Shaped[Array, "B H Q"] | None = None
    scores: Shaped[Array, "B H Q K"] | None = None


class Saved(NamedTuple):
    q: Shaped[Array, "B H Q D"]
    k: Shaped[Array, "B G K D"]
    v: Shaped[Array, "B W K E"]
    attn_bias: Shaped[Array, "*bias"] | None
    sinks: Shaped[Array, "H"] | None
    softmax: Shaped[Array, "B H Q K"]
    attn: Shaped[Array, "B H Q K"]  # the softmax, and 0 where the convention or q_seqlens say so
    lse: Shaped[Array, "B H Q"]
    uncapped: Shaped[Array, "B H Q K"] | None  # what the soft cap bends
    seen: Shaped[Bools, "B H Q K"] | None  # which keys take part; None for all
    dropout_keep: Shaped[Bools, "B? H? Q? K?"] | None
    stage: str | None  # of the scores that are returned
    rules: Rules


@shaped
@np.errstate(invalid="ignore", over="ignore")
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
    return_scores: str | None = None,
    convention: Convention | None = None,
) -> tuple[Shaped[Array, "B H Q E"] | Out, Saved]:
    where = "dot_product_attention.forward:"
    rules = settle(
        *(where, q, k, v, attn_bias, attn_mask, dropout_keep, dropout_p, scale, is_causal),
        *(q_offset, window, softcap, q_seqlens, kv_seqlens, convention),
    )
    expect(return_scores in (None, *STAGES), f"{where} return_scores", return_scores, f"None or one of {STAGES}")
    heads, i, j = q.shape[1], np.arange(q.shape[2]), np.arange(k.shape[2])
    order = rules.convention.gqa_order
    seen = visible(rules, mask_at(attn_mask, i, j, rules.offset), i, j)
    seen = None if seen is None else np.broadcast_to(seen, (len(q), heads, len(i), len(j)))
    logits, stages, uncapped = scores(q, for_heads(k, heads, order), attn_bias, seen, rules)
    softmax, lse = _softmax(logits, sinks, seen, rules)
    softmax, lse = only_real(softmax, i, rules, 0), only_real(lse, i, rules, -INF)
    attn = silence(softmax, seen, rules)
    weights = attn if dropout_keep is None else attn * dropout_keep * rules.keep_factor
    y = only_real(weigh(weights, for_heads(v, heads, order), seen, rules), i, rules, 0)
    saved = Saved(q, k, v, attn_bias, sinks, softmax, attn, lse, uncapped, seen, dropout_keep, return_scores, rules)
    if not return_lse and return_scores is None:
        return y, saved
    return Out(y, lse if return_lse else None, (stages | {"probs": attn}).get(return_scores)), saved


@shaped
@np.errstate(invalid="ignore", over="ignore")
def backward(
    dout: Shaped[Array, "B H Q E"] | Out, saved: Saved
) -> tuple[
    Shaped[Array, "B H Q D"],
    Shaped[Array, "B G K D"],
    Shaped[Array, "B W K E"],
    Shaped[Array, "*bias"] | None,
    Shaped[Array, "H"] | None,
]:
    q, k, v, attn_bias, sinks, softmax, attn, lse, uncapped, seen, keep, stage, rules = saved
    dy, dlse, given = dout if isinstance(dout, Out) else (dout, None, None)
    dstages = {} if given is None else {stage: given}
    heads, order, i = q.shape[1], rules.convention.gqa_order, np.arange(q.shape[2])
    kept = 1 if keep is None else keep.astype(dy.real.dtype) * rules.keep_factor
    dy, dlse = only_real(dy, i, rules, 0), only_real(dlse, i, rules, 0)
    values = for_heads(v, heads, order)
    centre = _in_common(values, keep, rules)
    dattn = unweigh(dy, values - centre, seen, rules) * kept + dstages.get("probs", 0)
    dv = from_heads((taken(attn, seen, rules) * kept).swapaxes(-1, -2) @ dy, v.shape[1], order)
    dsoftmax = only_real(silence(dattn, seen, rules), i, rules, 0)
    share, dsink = 0, -only_real((dy * centre).sum(axis=-1, keepdims=True), i, rules, 0)
    if sinks is not None:  # a key whose value is 0
        share = np.exp(sinks[:, None] - np.where(np.isneginf(lse.real), INF, lse))[..., None]
    dlargest = _at_largest(dsoftmax, softmax, dsink, share)
    dsoftmax, dsink = dsoftmax - dlargest, dsink - dlargest
    pull = (0 if dlse is None else dlse[..., None]) - (dsoftmax * softmax).sum(axis=-1, keepdims=True) - share * dsink
    dlogits = softmax * (dsoftmax + pull)
    dproducts, dlogits = scores_backward(dlogits, dstages, uncapped, seen, rules)
    return (
        rules.scale * (dproducts @ for_heads(k, heads, order)),
        from_heads(rules.scale * (dproducts.swapaxes(-1, -2) @ q), k.shape[1], order),
        dv,
        None if attn_bias is None else shrink(dlogits, attn_bias.shape),
        None if sinks is None else (share * (dsink + pull)).sum(axis=(0, 2, 3)),
    )


def _in_common(v, keep, rules):
    """Something to subtract from all values (B, H, 1, E): pbar changes by one number a row, and the logits do not."""
    rest = rules.convention.fully_masked == "zero_probs" or rules.convention.masked_values == "skip"
    if keep is not None or rest or not v.shape[2]:  # pbar would change here and there
        return np.zeros_like(v[:, :, :0].sum(axis=2, keepdims=True))
    size = (v.real * v.real).sum(axis=-1, keepdims=True)  # of the smallest value: masked ones may be huge
    at = np.where(np.isnan(size), INF, size).argmin(axis=2, keepdims=True)
    smallest = np.take_along_axis(v, at, axis=2)
    return np.where(np.isfinite(smallest), smallest, 0)


def _at_largest(dsoftmax, softmax, dsink, share):
    """pbar of the likeliest key, the sink among them: pbar - sum pbar p loses all digits where one p is nearly 1."""
    if not softmax.shape[-1]:
        return dsink
    at = np.take_along_axis(dsoftmax, softmax.real.argmax(axis=-1)[..., None], axis=-1)
    at = np.where(softmax.real.max(axis=-1, keepdims=True) < np.real(share), dsink, at)
    return np.where(np.isfinite(at), at, 0)


# --- the steps, of any part of the queries and keys: streaming takes them too --------------------------------


def visible(rules, mask, i, j):
    """True where the key at j takes part for query i, broadcastable to (B, H, Q, K); None for everywhere."""
    p = i[:, None] + rules.offset
    conditions = [mask] if mask is not None else []
    if rules.is_causal:
        conditions.append(j <= p)
    if rules.left < INF:
        conditions.append(j >= p - rules.left)
    if rules.right < INF:
        conditions.append(j <= p + rules.right)
    if rules.key_lengths is not None:
        conditions.append(j < rules.key_lengths)
    return functools.reduce(np.logical_and, conditions) if conditions else None


def scores(q, k, bias, seen, rules):
    """The logits; {stage: scores}; and what the soft cap bent, or None."""
    x, uncapped, stages = (rules.scale * q) @ k.swapaxes(-1, -2), None, {}
    stages["scaled"] = x
    steps = {"scale": None, "bias": bias, "mask": seen}
    for step, operand in steps.items():
        if step == "bias" and operand is not None:
            x = x + operand
        if step == "mask" and operand is not None:
            x = _masked(x, operand, rules.convention)
        if step == "mask":
            stages["biased"] = x
        if step == rules.convention.softcap_after:
            if rules.softcap is not None:
                uncapped, x = x, _cap(x, rules.softcap)
            stages["softcapped"] = x
    return x, stages, uncapped


def scores_backward(dx, dstages, uncapped, seen, rules):
    """From the gradient of the logits to that of the products, and to that of attn_bias before it is summed."""
    dbias = None
    for step in ("mask", "bias", "scale"):
        if step == rules.convention.softcap_after:
            dx = _join(dx, dstages.get("softcapped"))
            if uncapped is not None:
                dx = dx * _cap_slope(uncapped, rules.softcap)
        if step == "mask":
            dx = _join(dx, dstages.get("biased"))
            if seen is not None and rules.convention.mask_op == "replace":
                dx = np.where(seen, dx, 0)
        if step == "bias":
            dbias = dx
    return _join(dx, dstages.get("scaled")), dbias


def _join(dx, more):
    return dx if more is None else dx + more


def _masked(x, seen, convention):
    value = np.finfo(x.dtype).min if convention.mask_value == "lowest" else convention.mask_value
    if convention.mask_op == "replace":
        return np.where(seen, x, value)
    return x + np.where(seen, 0, value).astype(x.real.dtype)


def _cap(x, softcap):
    forbidden = np.isneginf(x.real)  # an infinite complex number cannot be divided
    return np.where(forbidden, -softcap, softcap * np.tanh(np.where(forbidden, 0, x) / softcap))


def _cap_slope(x, softcap):
    """1 - tanh^2 u = 4 sigmoid(2 u) sigmoid(-2 u), which does not cancel."""
    forbidden = np.isneginf(x.real)
    u = np.where(forbidden, 0, x) / softcap
    return np.where(forbidden, 0, 4 * sigmoid(2 * u) * sigmoid(-2 * u))


def _softmax(logits, sinks, seen, rules):
    """The probabilities, and the logarithm of what they were divided by."""
    dtype, precision = logits.dtype, rules.convention.softmax_precision
    if precision is not None and logits.dtype.kind != "c":  # a complex step stays as small as it is
        logits = logits.astype(precision)
    sink = np.full((), -INF, logits.dtype) if sinks is None else sinks[:, None, None].astype(logits.dtype)
    top = np.maximum(logits.real.max(axis=-1, keepdims=True, initial=-INF), sink.real)
    shift = np.where(np.isneginf(top), 0, top)
    e = np.exp(logits - shift)
    total = e.sum(axis=-1, keepdims=True) + np.exp(sink - shift)
    nothing = np.isneginf(top)
    attn = e / np.where(nothing, 1, total)
    rule = rules.convention.fully_masked
    if rule == "nan":
        attn = np.where(nothing, np.nan, attn)
    if rule == "zero_masked_only":
        attn = np.where(nothing & (True if seen is None else seen.any(axis=-1, keepdims=True)), np.nan, attn)
    lse = np.where(nothing, -INF, shift + np.log(np.where(nothing, 1, total)))
    return attn.astype(dtype), lse[..., 0].astype(dtype)


def silence(x, seen, rules):
    """x of (B, H, Q, K), under fully_masked="zero_probs" 0 for all that is masked."""
    return x if rules.convention.fully_masked != "zero_probs" or seen is None else np.where(seen, x, 0)


def only_real(x, i, rules, padding):
    """x of (B, H, Q) or (B, H, Q, ...), or None, with `padding` for queries from q_seqlens on."""
    if x is None or rules.query_lengths is None:
        return x
    real = i[:, None] < rules.query_lengths
    return np.where(real if x.ndim == real.ndim else real[..., 0], x, padding)


def weigh(weights, v, seen, rules):
    """sum_j weights_ij v_j; under masked_values="skip" over what takes part, so that NaN in the rest is lost."""
    if rules.convention.masked_values == "multiply" or seen is None:
        return weights @ v
    weights = taken(weights, seen, rules)
    if np.isfinite(v).all():
        return weights @ v
    return np.where(seen[..., None], weights[..., None] * v[..., None, :, :], 0).sum(axis=-2)


def unweigh(dy, v, seen, rules):
    """ybar_i . v_j."""
    return taken(dy @ v.swapaxes(-1, -2), seen, rules)


def taken(x, seen, rules):
    """x of (B, H, Q, K), under masked_values="skip" 0 for all that is masked."""
    return x if rules.convention.masked_values == "multiply" or seen is None else np.where(seen, x, 0)


def for_heads(x, heads, order):
    """The heads of keys or values, (B, G, ...), as the heads of queries use them, (B, H, ...)."""
    times = heads // x.shape[1]
    if times == 1:
        return x
    return x.repeat(times, axis=1) if order == "repeat_interleave" else np.tile(x, (1, times, 1, 1))


def from_heads(x, heads, order):
    """The transpose of for_heads: the sum over the query heads that share a head."""
    b, shared, *rest = x.shape
    times = shared // heads
    split = (b, heads, times, *rest) if order == "repeat_interleave" else (b, times, heads, *rest)
    return x.reshape(split).sum(axis=2 if order == "repeat_interleave" else 1)


def shrink(x, shape):
    """The transpose of broadcasting: x summed to `shape`."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def mask_at(mask, i, j, offset):
    """attn_mask for queries i and keys j, if it is not an array but a mask of refattn.masks, which sees positions."""
    if mask is None or isinstance(mask, np.ndarray):
        return mask
    said = [mask(i[:, None] + shift, j[None, :]) for shift in offset.ravel()]
    if len(said) == 1:
        return said[0]
    said = [m.reshape((1,) * (4 - m.ndim) + m.shape) for m in said]  # of every item, at its own positions
    return np.concatenate([m[b : b + 1] if len(m) > 1 else m for b, m in enumerate(said)])


# --- the options ----------------------------------------------------------------------------------------------


def settle(
    where, q, k, v, bias, mask, keep, dropout_p, scale, is_causal, q_offset, window, softcap, q_seqlens, kv_seqlens, say
):
    """Rules from the options of a call, `say` being the convention; every bad one raises an error that names it."""
    say, (batch, heads, queries, features) = say or Convention(), q.shape
    keys, full = k.shape[2], (batch, heads, queries, k.shape[2])
    for name, choices in CHOICES.items():
        value = getattr(say, name)
        expect(value in choices, f"{where} convention.{name}", value, f"one of {', '.join(choices)}")
    value, precision = say.mask_value, say.softmax_precision
    expect(_number(value) or value == "lowest", f"{where} convention.mask_value", value, "a number, or 'lowest'")
    good = precision is None or _is_dtype(precision)
    expect(good, f"{where} convention.softmax_precision", precision, "a floating-point dtype, or None")
    for name, x in (("k", k), ("v", v)):
        shared = x.shape[1]
        expect(shared > 0 and heads % shared == 0, f"{where} {name}.shape", x.shape, f"a divisor of H = {heads} heads")
    if mask is not None and not hasattr(mask, "array"):
        _check_mask(f"{where} attn_mask", mask, full)
    for name, x in (("attn_bias", bias), ("dropout_keep", keep)):
        fits = x is None or (x.ndim <= 4 and all(n in (1, m) for n, m in zip(x.shape[::-1], full[::-1])))
        expect(fits, f"{where} {name}.shape", x is None or x.shape, f"one that broadcasts to (B, H, Q, K) = {full}")
    expect(0 <= dropout_p < 1, f"{where} dropout_p", dropout_p, "a probability less than 1")
    expect(dropout_p == 0 or keep is not None, f"{where} dropout_p", dropout_p, "0, or dropout_keep with it")
    scale = say.scale if scale is None else scale
    if scale is None:
        expect(features > 0, f"{where} q.shape", q.shape, "at least one feature, or a scale")
        scale = 1 / math.sqrt(features)
    expect(_number(scale) and math.isfinite(scale), f"{where} scale", scale, "a finite number, or None")
    expect(softcap is None or (_number(softcap) and softcap > 0), f"{where} softcap", softcap, "more than 0, or None")
    is_causal = say.is_causal if is_causal is None else is_causal
    expect(isinstance(is_causal, (bool, np.bool_)), f"{where} is_causal", is_causal, "True, False or None")
    left, right = _window(f"{where} window", window)
    for name, lengths, longest in (("q_seqlens", q_seqlens, queries), ("kv_seqlens", kv_seqlens, keys)):
        fits = lengths is None or ((lengths >= 0) & (lengths <= longest)).all()
        expect(fits, f"{where} {name}", lengths, f"lengths from 0 to {longest}")
    offset = _offset(
        *(f"{where} q_offset", say.q_offset if q_offset is None else q_offset),
        *(queries if q_seqlens is None else q_seqlens, keys if kv_seqlens is None else kv_seqlens, batch),
    )
    q_seqlens, kv_seqlens = (None if x is None else x.reshape(-1, 1, 1, 1) for x in (q_seqlens, kv_seqlens))
    factor = 1 / (1 - dropout_p)
    return Rules(
        float(scale), softcap, bool(is_causal), offset, left, right, q_seqlens, kv_seqlens, factor, say
    )


def _check_mask(what, mask, full):
    described = getattr(mask, "dtype", type(mask).__name__)
    expect(isinstance(mask, np.ndarray) and mask.dtype == bool, what, described, "an array of bool, True: takes part")
    fits = mask.ndim in (2, 4) and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1]))
    words = f"(Q, K) = {full[2:]} or (B, H, Q, K) = {full}, each axis that long or 1"
    expect(fits, f"{what}.shape", mask.shape, words)


def _is_dtype(x):
    try:
        return np.issubdtype(np.dtype(x), np.floating)
    except TypeError:
        return False


def _number(x):
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def _window(what, window):
    """(left, right) as numbers, inf for no limit."""
    words = "None or (left, right), each None or an int of at least 0"
    pair = (None, None) if window is None else window
    expect(isinstance(pair, tuple) and len(pair) == 2, what, window, words)
    good = all(x is None or (isinstance(x, (int, np.integer)) and not isinstance(x, bool) and x >= 0) for x in pair)
    expect(good, what, window, words)
    return tuple(INF if x is None else x for x in pair)


def _offset(what, offset, query_lengths, key_lengths, batch):
    """How far the position of query i is beyond i: (1 or B, 1, 1, 1)."""
    if isinstance(offset, str):
        expect(offset in ("top_left", "bottom_right"), what, offset, "an int, 'top_left' or 'bottom_right'")
        offset = 0 if offset == "top_left" else np.subtract(key_lengths, query_lengths, dtype=np.int64)
    offset = np.asarray(offset)
    good = offset.dtype.kind in "iu" and offset.shape in ((), (batch,))
    expect(good, what, offset.tolist(), f"an int, one for each of B = {batch} items, 'top_left' or 'bottom_right'")
    return offset.astype(np.int64).reshape(-1, 1, 1, 1)


def example(draw):
    b, shared, times = draw.size("B", high=2), draw.size("G", high=2), draw.size("H / G", high=2)
    heads, queries, keys, features = shared * times, draw.size("Q", high=3), draw.size("K", high=3), draw.size("D")
    q, k = draw.array(b, heads, queries, features), draw.array(b, shared, keys, features)
    v = draw.array(b, draw.choice("W", shared, 1, heads), keys, draw.size("E", high=3))
    full = b, heads, queries, keys
    masked, stage = draw.choice("masked", None, (1, 2, 3, 4), (3, 4), (1,)), draw.choice("scores", None, *STAGES)
    mask = None
    if masked:
        shape = [n if axis in masked else 1 for axis, n in enumerate(full, 1)]
        mask = draw.mask(*(shape if 1 in masked else shape[2:]))
    biased = draw.choice("attn_bias", None, full, (heads, 1, keys), (queries, 1))
    keep = draw.mask(b, 1, queries, keys) if draw.choice("dropout", False, True) else None
    limits = draw.choice("window", None, (1, 0), (None, 1), (0, None))
    causal = draw.choice("is_causal", None, True, False)
    lengths = None, None
    if draw.choice("padded", False, True):
        lengths = draw.integers(0, queries, b), draw.integers(0, keys, b)
    hidden = any(x is not None for x in (mask, limits, lengths[1])) or causal
    options = {
        "scale": draw.choice("scale", None, 0.5, -0.3),
        "attn_mask": mask,
        "is_causal": causal,
        "q_offset": draw.choice("q_offset", None, "bottom_right", 1, draw.integers(0, 2, b)),
        "window": limits,
        "softcap": draw.choice("softcap", None, 1.5),
        "q_seqlens": lengths[0],
        "kv_seqlens": lengths[1],
        "dropout_keep": keep,
        "dropout_p": 0.0 if keep is None else 0.25,
        "return_lse": not hidden and lengths[0] is None and draw.choice("lse", True, False),
        "return_scores": None if hidden and stage in ("biased", "softcapped") else stage,  # -inf has no gradient
        "convention": Convention(
            mask_op=draw.choice("mask_op", "replace", "add"),
            fully_masked=draw.choice("fully_masked", "zero", "zero_probs"),
            masked_values=draw.choice("masked_values", "multiply", "skip"),
            softcap_after=draw.choice("softcap_after", "scale", "bias", "mask"),
            gqa_order=draw.choice("gqa_order", "repeat_interleave", "tile"),
        ),
    }
    bias = None if biased is None else draw.array(*biased)
    return Call((q, k, v, bias, draw.array(heads) if draw.choice("sinks", False, True) else None), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval"),
    witnesses=("framework", "definition", "relation"),
)
