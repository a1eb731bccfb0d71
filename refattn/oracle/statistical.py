r"""How far rounding puts dot-product attention off, usually: one standard deviation of the error.

Two assumptions beyond an Arithmetic, both on chance: rounding errors are independent and uniform, of variance u^2 / 3;
and the order of a sum is unrelated to its terms. Then the sum A of n terms a_j with Q = sum a_j^2 is off by
    variance u^2 / 3 (n (A^2 / 3 + Q / 6) + Q)
where the worst case has (n u sum |a_j|)^2, larger by n and more. The assumptions hold of inputs that are drawn, not of
keys in equal groups with values of one sign: rounding errors conspire there. So this is used on inputs of families that
say so (refattn.oracle.inputs), and the worst case on all.

Variances go through the formulas to first order, inflated by e^{LAMBDA sd} for the second; `common` is what all keys of
a row share (their query was rounded), and an underflow, which is always to one side, is a bound of its own.
The formulas stand in the order of refattn.oracle.worst_case.
"""

from typing import Any, NamedTuple

import numpy as np

from refattn.oracle.arithmetic import half_ulp
from refattn.oracle.attention_part import VISIBLE, chain, units
from refattn.oracle.worst_case import lost_of_dscores, lost_of_sinks

LAMBDA = 7.5  # a Gaussian is off by so many standard deviations in one of 10^13 cases: one of 10^7 tensors of 10^6
LINEAR = 20  # an exponent may be off by so much, and what is said here to first order still holds
THIRD = 1 / 3  # the variance of a number between -1 and 1


class Forward(NamedTuple):
    """Variances, and `lost`: what underflow may take, a bound."""

    out: Any
    lse: Any
    lost: Any
    own: Any  # of the exponents, independent from key to key
    common: Any  # and of what they share
    score: Any  # of the logits, before the soft cap
    grown: Any  # p e^{LAMBDA sd}
    sums: Any  # of the sums in y alone
    divisor: float


def forward(part):
    a, u = part.arithmetic, units(part.arithmetic)
    keys, features = part.p.shape[-1], part.q.shape[-1]
    own, common, score = _exponents(part, a, u, keys, features)
    spread = (own + common).max(axis=-1, keepdims=True, initial=0)
    exponent = LAMBDA * np.sqrt(spread)
    grown = part.p * np.exp(np.where(exponent > LINEAR, np.inf, exponent))  # then the worst case holds
    moved = grown * grown * (own + common)
    y, size = part.y, np.abs(part.v)
    shared = 0.0 if np.isscalar(common) else (grown * np.sqrt(common)).sum(axis=-1, keepdims=True) ** 2
    if part.kept is None:
        away = part.y - part.centre
        around = moved @ (part.centred * part.centred) - 2 * away * (moved @ part.centred)
        around = np.maximum(around + away * away * moved.sum(axis=-1, keepdims=True), 0)
        weights = part.p
    else:
        weights = part.p * part.kept
        around = (moved * part.kept**2) @ (part.v * part.v) - 2 * y * ((moved * part.kept) @ part.v)
        around = np.maximum(around + y * y * moved.sum(axis=-1, keepdims=True), 0)
    squares = (weights * weights) @ (part.v * part.v)
    sums = _sum(a, u, keys, y, squares, lambda: weights @ size)
    n = chain(a, keys)
    divisor = u.softmax**2 * THIRD * (n / 3 + 2)
    apart = THIRD * (u.prob**2 + u.op**2) * squares + _vanished(part) * (size * size).sum(axis=-2, keepdims=True)
    lost = 0.0
    if u.lost_prob > VISIBLE:
        most = u.lost_prob if a.probs_normalised else u.lost_prob / part.total
        kept = 1 if part.kept is None else part.kept
        some = np.minimum(part.p, most) * kept
        apart = apart + (some * some) @ (part.v * part.v)
        lost = (np.where(part.p < most, part.p, 0) * kept) @ size
    sink = part.sink**2 * THIRD * (u.softmax**2 * 3 * part.sink_below**2 + 2 * a.exp_error**2)
    out = around + apart + sums + (divisor + 4 * THIRD * u.softmax**2 + sink) * y * y
    if a.operands_truncate:
        out = out + (0.5 * u.op * np.minimum(weights @ size, np.abs(y) + 3 * np.sqrt(squares))) ** 2
    logs = 3 * part.top**2 + 3 * part.log_total**2 + 2 * part.lse**2 + 4
    lse = moved.sum(axis=-1, keepdims=True) + shared + divisor + THIRD * u.softmax**2 * logs
    lse = lse + sink
    lost = lost + u.floor * size.sum(axis=-2, keepdims=True)
    if a.operands_truncate:
        shift = _shift(part)
        weights = shift if part.kept is None else shift * part.kept
        lost = lost + u.op * np.abs(weights @ part.v) + 0.5 * u.op * np.abs(y)
    return Forward(out, lse, lost, own, common, score, grown, sums, divisor)


def _exponents(part, a, u, keys, features):
    """Variances of what stands in the exponent: key by key; common to a row; and of the products alone."""
    # The order of the features is not left to chance: a few are large, always the same. 4 Q / 6 + A^2 / 3 covers it.
    squares = part.scale**2 * ((part.q * part.q) @ (part.k * part.k).swapaxes(-1, -2))
    product = _sum(a, u, features, part.x, 4 * squares, lambda: part.scale * (np.abs(part.q) @ _turned(np.abs(part.k))))
    product += THIRD * (2 * u.softmax**2 + a.score_roundings * u.score**2) * part.x**2
    product += a.score_roundings * u.lost_score**2
    product += u.lost_query**2 * (part.k * part.k).sum(axis=-1)[..., None, :]
    common = 0.0
    if u.op or u.query:
        common = THIRD * (u.op**2 + u.query**2) * squares
        if a.operands_truncate:
            common = common + (0.5 * u.op * part.x) ** 2
    own = product = product + common  # of the rounded keys, and of the rounded query
    bias = THIRD * max(u.softmax, u.score) ** 2 if part.biased else 0.0
    if part.biased and part.cap_last:
        own = own + bias * (np.abs(part.x) + part.s) ** 2
    if part.softcap is not None:
        bend = part.slope * part.slope
        own, common = own * bend, common * bend
        capped = part.softcap * part.t
        own = own + THIRD * (a.tanh_error**2 + 3 * u.softmax**2 + u.score**2) * capped * capped
    if part.biased and not part.cap_last:
        own = own + bias * part.s**2
    own, common = own * part.seen, common * part.seen if u.op or u.query else 0.0
    own = own + THIRD * (u.softmax**2 * 3 * part.below**2 + a.exp_error**2)
    own = own + part.records * THIRD * (a.exp_error**2 + u.softmax**2)
    if a.splits > 1:
        own = own + THIRD * 8 * u.softmax**2 * (part.top**2 + np.log(keys) ** 2)
    return own, common, product


class Backward(NamedTuple):
    """Variances, and bounds of what underflow may take."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any  # key by key; of what is common to a row; and of its sum over the keys (h, r, 1)
    dsinks: Any
    lost_dq: Any
    lost_dk: Any
    lost_dv: Any
    lost_dbias: Any  # a number
    lost_dsinks: Any  # (h, r, 1)


def backward(part, fwd, queries):
    a, u = part.arithmetic, units(part.arithmetic)
    keys, features = part.p.shape[-1], part.v.shape[-1]
    p2, delta2, slope = fwd.grown * fwd.grown, part.delta * part.delta, 1 if part.slope is None else part.slope
    kept = 1 if part.kept is None else part.kept
    q2, k2, v2, dy2 = (x * x for x in (part.q, part.k, part.v, part.dy))
    squares = (dy2 @ _turned(v2)) * kept**2
    dp = _sum(a, u, features, part.dp, 4 * squares, lambda: (np.abs(part.dy) @ _turned(np.abs(part.v))) * kept)
    dp = dp + THIRD * (u.dprob**2 + (0 if part.kept is None else u.softmax**2)) * part.dp**2
    dp = dp + THIRD * 2 * u.op**2 * squares + u.lost_dprob**2
    z = fwd.own + THIRD * (u.softmax**2 * 3 * (part.below + part.log_total) ** 2 + a.exp_error**2)
    lost = np.minimum(part.p, u.lost_prob) if u.lost_prob > VISIBLE else 0.0
    gone = np.where(part.p < u.lost_prob, part.p, 0) if u.lost_prob > VISIBLE else 0.0
    d = _row_sum(part, fwd, a, u, p2, delta2, dp, lost, gone)

    in_ds = u.prob if a.probs_in_dscores else 0.0
    ds = p2 * (delta2 * (z + fwd.common + THIRD * (4 * u.softmax**2 + in_ds**2)) + dp)
    if in_ds:
        ds = ds + lost * lost * delta2
    ds_only = part.ds * part.ds
    dx2, dx = ds_only * slope**2, ds * slope**2
    if part.softcap is not None:
        bent = (2 * part.t) ** 2 * (fwd.score * (part.slope / part.softcap) ** 2 + a.tanh_error**2 * part.t**2)
        dx = dx + ds_only * (bent + 2 * u.softmax**2)
    made2 = dx2 + p2 * slope**2 * d  # the size of what is rounded, D being off
    dx = dx + THIRD * (u.dscore**2 + u.op**2 + u.query**2) * made2
    dx = dx + lost_of_dscores(part, u) ** 2
    once_more = fwd.lse + 3 * THIRD * u.softmax**2
    coefficient = ((part.p * slope) @ part.k) ** 2
    n = chain(a, keys)
    of_sum = u.acc**2 * THIRD * (n / 6 + 1)
    of_part = 0.0
    dq = part.dq**2 * (once_more + THIRD * u.query**2 + u.acc**2 * THIRD * n / 3)
    if a.partial is not None:
        times = -(-keys // a.partial_keys)
        of_part = a.partial.u**2 * THIRD * times / 6
        dq = dq + a.partial.u**2 * THIRD * (times / 3 + 1) * part.dq**2 + times * a.partial.eta**2
    vanished = _vanished(part) * (1 + delta2.max(initial=0))
    dq = dq + part.scale**2 * ((dx + (of_sum + of_part) * made2) @ k2 + coefficient * d)
    dq = dq + part.scale**2 * vanished * k2.sum(axis=-2, keepdims=True)
    if a.accumulator_truncates:
        dq = dq + (0.25 * u.acc * n * (part.dq + part.scale * np.sqrt(dx2 @ k2))) ** 2
    m = chain(a, queries)
    of_sum = u.acc**2 * THIRD * (m / 6 + 1)
    if a.partial is not None:
        of_sum = of_sum + a.partial.u**2 * THIRD * -(-queries // a.partial_queries) / 6
    columns = dx + p2 * slope**2 * d + dx2 * once_more + made2 * of_sum
    dk = part.scale**2 * (_turned(columns) @ q2 + vanished * q2.sum(axis=-2, keepdims=True))
    dk = dk + u.lost_query**2 * dx2.sum(axis=-2)[..., None]
    weights = (part.p * kept) ** 2
    columns = (fwd.grown * kept) ** 2 * (z + fwd.common + fwd.lse + THIRD * (u.prob**2 + u.op**2))
    columns = columns + (lost * kept) ** 2 + of_sum * weights
    dv = _turned(columns) @ dy2 + _vanished(part) * dy2.sum(axis=-2, keepdims=True)
    size_q, size_k, size_dy = np.abs(part.q), np.abs(part.k), np.abs(part.dy)
    gate = 4 * u.floor * (part.delta.max(initial=0) + (size_dy @ _turned(np.abs(part.v))).max(initial=0))
    lost_dq = part.scale * gate * size_k.sum(axis=-2, keepdims=True)
    lost_dk = part.scale * gate * size_q.sum(axis=-2, keepdims=True)
    lost_dv = 4 * u.floor * size_dy.sum(axis=-2, keepdims=True)
    if u.op:  # a key is rounded once for all queries; and truncation is to one side, as if the scale were smaller
        shift = _shift(part)
        dshift = shift * part.ds / np.where(part.p > 0, part.p, 1) - part.p * (shift * part.dp).sum(-1, keepdims=True)
        dshift = dshift * slope
        columns = u.op * (1.5 if a.operands_truncate else 1)
        lost_dk = lost_dk + columns * np.abs(part.scale * (_turned(dshift + part.ds * slope) @ part.q))
        lost_dv = lost_dv + columns * np.abs(_turned((shift + part.p) * kept) @ part.dy)
        if a.operands_truncate:
            lost_dq = lost_dq + u.op * (np.abs(part.scale * (dshift @ part.k)) + part.dq)
    if u.lost_prob > VISIBLE:
        lost_dv = lost_dv + _turned(gone * kept) @ size_dy
        if in_ds:
            lost_dq = lost_dq + part.scale * ((gone * part.delta) @ size_k)
            lost_dk = lost_dk + part.scale * (_turned(gone * part.delta) @ size_q)
    dbias = None
    if part.biased:
        bend2 = slope**2 if part.cap_last else 1
        dbias = dx if part.cap_last else ds + THIRD * u.dscore**2 * ds_only
        dbias = dbias + vanished * part.alive
        common = bend2 * (p2 * d + ds_only * fwd.lse)  # D and lse are off by one number a row
        sums = [(x * (slope if part.cap_last else 1)).sum(axis=-1, keepdims=True) ** 2 for x in (fwd.grown, part.ds)]
        dbias = dbias, common, sums[0] * d + sums[1] * fwd.lse
    below = part.sink_below + part.log_total
    of_sink = THIRD * (u.prob**2 + u.dscore**2) if in_ds else 0.0
    dsinks = part.sink**2 * (part.d**2 * (fwd.lse + 6 * u.softmax**2 * (1 + below**2) + of_sink) + d)
    lost_dsinks = lost_of_sinks(part, u, part.d + LAMBDA * np.sqrt(d))
    return Backward(dq, dk, dv, dbias, dsinks, lost_dq, lost_dk, lost_dv, gate, lost_dsinks)


def _row_sum(part, fwd, a, u, p2, delta2, dp, lost, gone):
    """The variance of D (h, r, 1)."""

    def total(x):
        return x.sum(axis=-1, keepdims=True)

    dp2, d2 = part.dp * part.dp, part.d * part.d
    common = total(p2 * ((fwd.own + fwd.common) * delta2 + THIRD * (u.prob**2 + u.op**2) * dp2)) + fwd.divisor * d2
    if u.lost_prob > VISIBLE:
        common = common + total(lost * lost * dp2) + total(gone * part.dp) ** 2 / LAMBDA**2
    products = part.dy * part.y
    squares = total(products * products)
    dy2 = part.dy * part.dy
    stored = half_ulp(part.y, a.saved_out or a.out)
    of_y = _plain_sum(u, chain(a, part.v.shape[-1]), d2, 4 * squares)
    of_y = of_y + total(dy2 * (fwd.sums + THIRD * stored * stored))
    of_p = total(p2 * dp) + _plain_sum(u, chain(a, part.p.shape[-1]), d2, total(p2 * dp2))
    d = common + np.maximum(of_y, of_p) + THIRD * u.softmax**2 * d2
    if u.op:  # dy is rounded in dy v, not in dy y: what that does is common to the row
        d = d + (THIRD + (0.25 if a.operands_truncate else 0)) * u.op**2 * total(dy2 * part.y**2)
        d = d + (0.5 * u.op) ** 2 * d2 * a.operands_truncate
    return d


def _shift(part):
    """How p changes with the logarithm of the scale."""
    x = part.x if part.slope is None else part.x * part.slope
    return part.p * (x - (part.p * x).sum(axis=-1, keepdims=True))


def _vanished(part):
    """What squares may have lost of each term here, since they are computed in a finite range themselves."""
    return 10 * float(np.finfo(part.p.dtype).tiny)


def _plain_sum(u, n, total2, squares):
    return u.softmax**2 * THIRD * (n * (total2 / 3 + squares / 6) + squares)


def _sum(a, u, n, total, squares, size):
    """Of a sum in the accumulator; one that truncates is off to one side. `size()` is the sum of the absolute terms."""
    n = chain(a, n)
    variance = u.acc**2 * THIRD * (n * (total * total / 3 + squares / 6) + squares)
    if a.accumulator_truncates:
        variance = variance + (0.25 * u.acc * n * np.minimum(size(), np.abs(total) + np.sqrt(squares))) ** 2
    return variance


def _turned(x):
    return x.swapaxes(-1, -2)
