r"""How far rounding can put dot-product attention off, at worst: no assumption on how errors fall.

It holds for any order of summation, any tiles, split keys, fused multiply-add or not, exp or exp2, p rounded before or
after it is normalised, as long as the kernel rounds where its Arithmetic says. The derivation is on the page "Rounding"
of the documentation; here, in its order, with u for a unit roundoff and e^ for the error of what stands after it.

Scores
    e^x = a G,  a = (1 + u_op)^2 (1 + u_query)^2 (1 + (D + 1) u_acc) - 1,  G = scale |q| . |k|
    then the factors of the scale and of storing; the slope of the soft cap at its largest; the bias.
Softmax, in the logarithm: what a kernel has in place of e^{s_j} is e^{s_j + eta_j}, |eta_j| <= h_j
    h_j = e^s_j + 3 u (below_j + e^s_j + max e^s) + 2 e^exp + T (e^exp + u)       T tiles, each may rescale
    and since eta is the same above and below the fraction line, only centred values count:
    |y' - y| <= sum_j p_j (e^{h_j} - 1) |v_j - y| / sum_j p_j e^{-h_j}
    What is not shared (p cast, products, sums, division) multiplies sum_j p_j |v_j|.
Backward: p once more from lse, so that its error splits into one per key, z_j, and one for the row, e^lse
    dv, dk:  sums over rows of absolute errors
    dq:      the error of D is one number per row, whose coefficient |sum_j p_j k_j| is known exactly
"""

from typing import Any, NamedTuple

import numpy as np

from refattn.oracle.arithmetic import half_ulp
from refattn.oracle.attention_part import VISIBLE, chain, tiles, units

SQUARES = 1e8  # times the smallest number, and what underflows beside them is nothing
MOST = 60.0  # an exponent that is off by so much is off altogether


class Forward(NamedTuple):
    """What the backward pass needs of the forward pass."""

    out: Any
    lse: Any
    h: Any  # without the rescaling
    score: Any  # e^s
    cap: Any  # e^t of the tanh, or 0
    moved: Any  # p (e^h - 1)
    most: Any  # e^h, at most (h, r, 1)
    least: Any  # sum p e^-h
    lost: Any


def forward(part):
    a, u = part.arithmetic, units(part.arithmetic)
    keys, features = part.p.shape[-1], part.q.shape[-1]
    score, cap = _scores(part, a, u, features)
    top_score = score.max(axis=-1, keepdims=True, initial=0)
    h = score + 3 * u.softmax * (part.below + score + top_score) + 2.02 * a.exp_error
    if a.splits > 1:
        h += 8 * u.softmax * (part.top + np.log(keys) + top_score)
    rescale = 1.01 * tiles(a, keys) * (a.exp_error + u.softmax)
    full = np.minimum(h + rescale, MOST)
    sink_h = 2 * a.exp_error + rescale + 3 * u.softmax * (part.sink_below + top_score)
    moved = part.p * _expm1(full)
    most = np.exp(full.max(axis=-1, keepdims=True, initial=0))
    rises, sink_rises = moved.sum(axis=-1, keepdims=True), part.sink * np.expm1(np.minimum(sink_h, MOST))
    falls = (part.p * full).sum(axis=-1, keepdims=True) + part.sink * sink_h
    least = np.maximum(1 - falls, 1 / np.maximum(most, np.exp(np.minimum(sink_h, MOST))))  # sum p e^-h

    weights = moved if part.kept is None else moved * part.kept
    y, size = np.abs(part.y - part.centre), np.abs(part.centred)
    spread = weights @ size + rises * y
    if part.kept is None:  # by Cauchy and Schwarz: the spread of the values about y, where its squares are numbers
        squares, cross = weights @ (size * size), weights @ part.centred
        around = squares - 2 * (part.y - part.centre) * cross + y * y * rises
        around = np.maximum(around, 0) + 1e-5 * (squares + y * y * rises)
        visible = (squares > SQUARES * np.finfo(squares.dtype).tiny) & (rises > VISIBLE)
        spread = np.where(visible, np.minimum(spread, np.sqrt(rises) * np.sqrt(around)), spread)
    spread = spread + sink_rises * np.abs(part.y)  # the sink's value is 0
    n = chain(a, keys) + tiles(a, keys)
    sums, divisor = _gamma((n + 1) * u.acc), _gamma((n + 1) * u.softmax)
    apart = _over((1 + u.prob) * (1 + u.op) ** 2 * (1 + sums) * (1 + u.softmax) ** 4, divisor)
    p = part.p if part.kept is None else part.p * part.kept
    total = p @ np.abs(part.v)
    lost = _lost_products(part, a, u, p) / least
    out = (spread + apart * most * total) / least + lost + u.floor * np.abs(part.v).sum(axis=-2, keepdims=True)
    lse = np.maximum(np.log1p(rises + sink_rises), -np.log(least)) + 1.01 * divisor
    lse = lse + u.softmax * (3 * part.top + 4 * part.log_total + 3 * part.lse + 2)
    lse = lse + half_ulp(part.lse + lse, a.lse)
    alive = ~part.dead
    return Forward(out * alive, lse * alive, h, score, cap, moved, most, least, lost)


def _scores(part, a, u, features):
    """The error of the logits, and of the tanh in the soft cap."""
    product = ((1 + u.op) * (1 + u.query)) ** 2 * (1 + (chain(a, features) + 1) * u.acc) - 1
    factors = (1 + u.softmax) ** 2 * (1 + u.score) ** a.score_roundings
    error = np.abs(part.q) @ np.abs(part.k).swapaxes(-1, -2)
    error *= part.scale * product * factors
    error += (factors - 1) * np.abs(part.x) + a.score_roundings * u.lost_score
    error += u.lost_query * np.abs(part.k).sum(axis=-1)[..., None, :]
    bias = max(u.softmax, u.score) if part.biased else 0.0
    cap = 0.0
    if part.cap_last and part.biased:
        error = error * (1 + bias) + bias * (np.abs(part.x) + part.s)
    if part.softcap is not None:
        slope = np.minimum(1, part.slope + 0.77 / part.softcap * error)  # sech^2 bends by at most 0.77
        cap = error * slope / part.softcap + a.tanh_error * part.t
        error = error * slope + (a.tanh_error + 3 * u.softmax + u.score) * part.softcap * part.t
    if not part.cap_last and part.biased:
        error = error * (1 + bias) + bias * part.s
    return error * part.seen, cap


def _lost_products(part, a, u, p):
    """Of small p that were cast: of the whole p where it is normalised before, else of what was not divided yet."""
    if u.lost_prob < VISIBLE:
        return 0.0
    most = u.lost_prob if a.probs_normalised else u.lost_prob / part.total
    lost = np.minimum(part.p, most) if part.kept is None else np.minimum(part.p, most) * part.kept
    return lost @ np.abs(part.v)


class Backward(NamedTuple):
    dq: Any
    dk: Any  # what these queries add
    dv: Any
    dbias: Any  # (h, r, K), of ds before it is summed; or None
    dsinks: Any  # (h, r, 1)


def backward(part, fwd, queries):
    """`queries` in all: the sums of dk and dv are that long."""
    a, u = part.arithmetic, units(part.arithmetic)
    keys, features = part.p.shape[-1], part.v.shape[-1]
    p, lse, slope = part.p, fwd.lse, 1 if part.slope is None else part.slope
    along_keys, along_queries = chain(a, keys), chain(a, queries)
    size_dy, size_v = np.abs(part.dy), np.abs(part.v)
    products = size_dy @ size_v.swapaxes(-1, -2)
    if part.kept is not None:
        products *= part.kept
    dp = ((1 + u.op) ** 2 * (1 + (chain(a, features) + 1) * u.acc) - 1) * (1 + u.dprob) * (1 + u.softmax) * products
    dp += (u.dprob + (0 if part.kept is None else u.softmax)) * part.dp + u.lost_dprob

    z = fwd.h + 3 * u.softmax * (part.below + part.log_total + fwd.score + lse) + 2 * a.exp_error + 2 * u.softmax
    z = np.minimum(z, MOST)
    in_ds = 3 * u.softmax + (1.01 * u.prob if a.probs_in_dscores else 0)
    moved, moved_with_lse = _expm1(z + in_ds), _expm1(z + in_ds + lse)
    lost = np.minimum(p, u.lost_prob) if u.lost_prob > VISIBLE else 0.0
    lost_in_ds = lost if a.probs_in_dscores else 0.0
    d = _row_sum(part, fwd, a, u, p, dp, products, moved_with_lse, lost_in_ds)

    own = p * moved
    ds = own * (part.delta + dp + d) + p * dp + lost_in_ds * (part.delta + dp + d)  # without the row's p e^D
    both = p * moved_with_lse
    ds_column = both * (part.delta + dp + d) + p * (dp + d) + lost_in_ds * (part.delta + dp + d)
    size_ds = np.abs(part.ds)
    dx = size_ds * slope
    bend = 0.0
    if part.softcap is not None:
        bend = 2 * part.t * fwd.cap + fwd.cap**2 + 2 * u.softmax
    lost_ds = lost_of_dscores(part, u)

    def stored(error, whole, n):
        """The error of dx once ds is bent, cast, and summed n times."""
        error = error * slope + (size_ds + whole) * bend
        error = error + u.dscore * (dx + whole) + lost_ds
        return error + ((n + 2) * u.acc + 2 * (u.op + u.query) + 3 * u.softmax) * (dx + whole + error)

    of_row = np.expm1(lse)
    rows = stored(ds, ds + p * d, along_keys) * (1 + of_row)
    size_k, size_q = np.abs(part.k), np.abs(part.q)
    coefficient = np.abs((p * slope) @ part.k)
    gate = 4 * u.floor * (part.delta.max(initial=0) + products.max(initial=0))
    dq = part.scale * (rows @ size_k + (1 + of_row) * coefficient * d) + of_row * part.dq
    dq += part.scale * gate * size_k.sum(axis=-2, keepdims=True)
    if a.partial is not None:
        times = -(-keys // a.partial_keys)
        dq = dq + times * (a.partial.u * (part.scale * dx @ size_k + dq) + a.partial.eta)
    columns = stored(ds_column, ds_column, along_queries)
    dk = part.scale * (columns.swapaxes(-1, -2) @ size_q + gate * size_q.sum(axis=-2, keepdims=True))
    dk = dk + u.lost_query * (dx + columns).sum(axis=-2)[..., None]
    weights = p * ((1 + _expm1(z + lse)) * (1 + u.prob) * (1 + u.op) ** 2 - 1) + lost
    weights += ((along_queries + 2) * u.acc + 2 * u.softmax) * (p + weights)
    weights = weights if part.kept is None else weights * part.kept
    dv = weights.swapaxes(-1, -2) @ size_dy + 4 * u.floor * size_dy.sum(axis=-2, keepdims=True)
    if a.partial is not None:  # running sums are as large as their absolute terms, at most
        times = -(-queries // a.partial_queries) * a.partial.u
        dk = dk + times * part.scale * (dx.swapaxes(-1, -2) @ size_q)
        dv = dv + times * ((p if part.kept is None else p * part.kept).swapaxes(-1, -2) @ size_dy)
    dbias = None
    if part.biased:
        before = ds_column if not part.cap_last else stored(ds_column, ds_column, 0)
        dbias = (before + u.dscore * (size_ds + ds_column) + gate) * part.alive
    off = lse + 4 * u.softmax + 3 * u.softmax * (part.sink_below + part.log_total)
    dsinks = part.sink * (np.expm1(off + (1.01 * u.prob if a.probs_in_dscores else 0)) * (part.d + d) + d)
    if a.probs_in_dscores:  # the sink is a column of p and of ds, and stored as they are
        dsinks = dsinks + u.dscore * (part.sink * part.d + dsinks)
    return Backward(dq, dk, dv, dbias, dsinks + lost_of_sinks(part, u, part.d + d))


def lost_of_dscores(part, u):
    """What underflow may take of each ds, as it stands before the scale."""
    if not u.lost_dscore:
        return 0.0
    if part.arithmetic.scaled_dscores:
        return u.lost_dscore * part.alive / part.scale if part.scale else 0.0
    return u.lost_dscore * part.alive


def lost_of_sinks(part, u, d):
    """What underflow may take of a sink's p, and of its ds (h, r, 1)."""
    a = part.arithmetic
    lost = np.minimum(part.sink, a.softmax.tiny + (u.lost_prob if a.probs_in_dscores else 0)) * d
    return lost + (u.lost_dscore * (part.sink > 0) if a.probs_in_dscores else 0)


def _row_sum(part, fwd, a, u, p, dp, products, moved, lost):
    """The error of D, computed from the stored y, or from p and dp: the larger one (h, r, 1)."""

    def total(x):
        return x.sum(axis=-1, keepdims=True)

    n = chain(a, p.shape[-1]) + tiles(a, p.shape[-1])
    sums, divisor = _gamma((n + 1) * u.acc), _gamma((n + 1) * u.softmax)
    features, keys = chain(a, part.v.shape[-1]) + 2, chain(a, p.shape[-1]) + 2
    apart = _over((1 + u.prob) * (1 + u.op) ** 2 * (1 + u.softmax) ** 4, divisor)
    weights = p + fwd.moved
    size_y, size_dy = np.abs(part.y), np.abs(part.dy)
    of_y = total(fwd.moved * part.delta + apart * weights * part.dp + sums * weights * products) / fwd.least
    of_y += total(size_dy * (half_ulp(size_y + fwd.out, a.saved_out or a.out) + fwd.lost))
    of_y = of_y * (1 + features * u.softmax) + features * u.softmax * total(size_dy * size_y)
    of_p = total((p * moved + lost) * (part.dp + dp) + p * dp) * (1 + keys * u.softmax)
    of_p += keys * u.softmax * total(p * part.dp)
    return np.maximum(of_y, of_p) + u.softmax * part.d


def _expm1(x):
    """e^x - 1, or a little more."""
    return x * (1 + 0.55 * x) if x.max(initial=0) < 0.1 else np.expm1(x)


def _over(x, divisor):
    """x / (1 - divisor) - 1; nothing is left of a sum that may be off by all of itself."""
    return x / (1 - divisor) - 1 if divisor < 1 else np.inf


def _gamma(x):
    return x / (1 - min(x, 0.5))
