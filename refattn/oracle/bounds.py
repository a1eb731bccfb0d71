r"""How far from the reference a right answer may be, element by element: dot-product attention, in closed form.

    bounds = attention_bounds(call, dout, ARITHMETICS["bf16_flash"])
    bounds["dk"].worst, bounds["dk"].stat                                 arrays like dk

What this is, and is not
    worst   rigorous under the stated Arithmetic: no order of summation, no tiles, no luck can put a kernel outside.
            Exceptions: the slope of the soft cap is bounded to second order, sums of an accumulator that truncates
            have n u in place of n u / (1 - n u). It is computed in floating point itself, then enlarged by SLACK.
    stat    LAMBDA standard deviations, under the assumptions of refattn.oracle.statistical; never more than worst.
            Legitimate on inputs that are drawn.
    sd      one standard deviation, the last rounding included: for tests of many elements together.
Each keeps the last rounding, to what is stored, in its worst form, half a unit in the last place: it is attained.
Of every other mechanism: refattn.oracle.noise.
"""

from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.attention.dot_product.dot_product_attention import Convention, Out, from_heads, shrink
from refattn.oracle import statistical, worst_case
from refattn.oracle.arithmetic import FLOAT32, half_ulp
from refattn.oracle.attention_part import chain, part_of, parts, pose
from refattn.oracle.compare import Bound

SLACK = {np.float32: 1.002, np.float64: 1 + 1e-9}  # for the rounding of the bound itself, by its dtype
LOWEST = float(np.finfo(np.float32).min)
GRADIENTS = "dq", "dk", "dv", "dattn_bias", "dsinks"
TIERS = "worst", "stat"


def reference(call, dout=None):
    """{name: array} of a canonical call: out, lse, and the gradients if there is a dout; in float64."""
    options = call.options | {"return_lse": True, "convention": exact(call.options.get("convention"))}
    (y, lse, _), saved = dot_product_attention.forward(*call.args, **options)
    values = {"out": y, "lse": lse}
    if dout is not None:
        dy, dlse = dout[:2] if isinstance(dout, tuple) else (dout, None)
        grads = dot_product_attention.backward(Out(dy, np.zeros_like(lse) if dlse is None else dlse, None), saved)
        values |= {name: g for name, g in zip(GRADIENTS, grads) if g is not None}
    return values


def exact(convention):
    """A convention as mathematics: no softmax in float32; a finite mask value replaces what it would swallow, and the
    lowest number is that of float32, which is low enough for all and which all can hold."""
    convention = convention or Convention()
    value = LOWEST if convention.mask_value == "lowest" else convention.mask_value
    convention = convention._replace(softmax_precision=None, mask_value=value)
    return convention._replace(mask_op="replace") if np.isfinite(value) else convention


def attention_bounds(call, dout, arithmetic, tiers=TIERS, values=None):
    """{name: Bound} of a canonical Call of dot_product_attention (refattn.oracle.canonical).

    `values`, what `reference` gives, saves computing it once more.
    """
    values = reference(call, dout) if values is None else values
    call = call._replace(options=call.options | {"convention": exact(call.options.get("convention"))})
    problem = pose(call, dout, values, arithmetic)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        worst = _collect(worst_case, problem) if "worst" in tiers else None
        stat = _collect(statistical, problem) if "stat" in tiers else None
        finish = _Finish(problem, call, values, arithmetic, SLACK[problem.dtype])
        return {n: finish.bound(n, worst, stat) for n in values if dout is not None or n in ("out", "lse")}


def _collect(tier, problem):
    """A tier's errors or variances of the whole call, {name: array}; dk and dv of every query head."""
    heads = problem.q.shape[:2]
    (queries, features), (keys, wide) = problem.q.shape[2:], problem.v.shape[2:]
    whole, gradients = problem.dtype, problem.dy is not None
    shapes = {"out": (queries, wide), "lse": (queries, 1), "lost": (queries, wide)}
    if gradients:
        shapes |= {"dq": (queries, features), "dk": (keys, features), "dv": (keys, wide), "dsinks": (1, 1)}
        shapes |= {"lost_dq": (queries, features), "lost_dk": (keys, features), "lost_dv": (keys, wide)}
        shapes |= {"lost_dsinks": (1, 1)}
        shapes |= {"abs_dk": (keys, features), "abs_dv": (keys, wide)}
        if problem.bias is not None:
            names = "dattn_bias", "common_dattn_bias", "abs_dattn_bias", "lost_dattn_bias"
            shapes |= dict.fromkeys(names, (queries, keys)) | {"row_dattn_bias": (queries, 1)}
    found = {name: np.zeros(heads + shape, np.float64 if "dsinks" in name else whole) for name, shape in shapes.items()}
    for b, some, rows in parts(problem):
        part = part_of(problem, b, some, rows)
        fwd = tier.forward(part)
        for name in ("out", "lse", "lost"):
            found[name][b, some, rows] = getattr(fwd, name)
        if not gradients:
            continue
        grads = tier.backward(part, fwd, queries)
        found["dq"][b, some, rows] = grads.dq
        found["dk"][b, some] += grads.dk
        found["dv"][b, some] += grads.dv
        found["dsinks"][b, some] += grads.dsinks.sum(axis=-2, keepdims=True)
        if tier is statistical:
            found["lost_dq"][b, some, rows] = grads.lost_dq
            found["lost_dk"][b, some] += grads.lost_dk
            found["lost_dv"][b, some] += grads.lost_dv
            found["lost_dsinks"][b, some] += grads.lost_dsinks.sum(axis=-2, keepdims=True)
        slope = 1 if part.slope is None else part.slope
        weights = part.p if part.kept is None else part.p * part.kept
        found["abs_dk"][b, some] += part.scale * ((part.ds * slope).swapaxes(-1, -2) @ part.q)  # made absolute below
        found["abs_dv"][b, some] += weights.swapaxes(-1, -2) @ part.dy
        if problem.bias is not None:
            found["abs_dattn_bias"][b, some, rows] = np.abs(part.ds)
            if tier is worst_case:
                found["dattn_bias"][b, some, rows] = grads.dbias
            else:
                for name, x in zip(("dattn_bias", "common_dattn_bias", "row_dattn_bias"), grads.dbias):
                    found[name][b, some, rows] = x
                found["lost_dattn_bias"][b, some, rows] = grads.lost_dbias * part.alive
    return found


class _Finish(NamedTuple):
    """From what one head makes of its own part to what is stored."""

    problem: Any
    call: Any
    values: dict
    arithmetic: Any
    slack: float

    def bound(self, name, worst, stat):
        value = np.abs(np.where(np.isfinite(self.values[name]), self.values[name], 0)).astype(np.float64)
        form = {"out": self.arithmetic.out, "lse": self.arithmetic.lse}.get(name, self.arithmetic.grad)
        flush = form.tiny if self.arithmetic.flush else 0
        dead = self._dead(name, value)
        most = None
        if worst is not None:
            error = self.slack * self._worst(name, worst, value)
            error = np.where(np.isnan(error), np.inf, error)  # an exponent may be off altogether: nothing is predicted
            most = np.where(dead, 0, error + half_ulp(value + error, form) + flush)
        if stat is None:
            return Bound(most)
        variance, lost = self._variance(name, stat, value)
        variance = np.where(np.isnan(variance), np.inf, variance)
        sd = self.slack * np.sqrt(variance)
        error = statistical.LAMBDA * sd + self.slack * lost
        usual = np.where(dead, 0, error + half_ulp(value + error, form) + flush)
        usual = usual if most is None else np.minimum(usual, most)
        last = half_ulp(value, form)
        return Bound(most, usual, np.sqrt(sd * sd + lost * lost + last * last / 3))

    def _dead(self, name, value):
        """Queries that attend to nothing: their zeros are exact."""
        if name not in ("out", "dq", "lse"):
            return np.zeros(value.shape, bool)
        dead = np.isneginf(self.values["lse"])
        return dead if name == "lse" else dead[..., None]

    def _worst(self, name, errors, value):
        a = self.arithmetic
        if name == "lse":
            return errors["lse"][..., 0].astype(np.float64)
        if name in ("dk", "dv"):
            heads = self._shared(name)
            error, size = self._sum(errors[name], heads), self._sum(np.abs(errors[f"abs_{name}"]), heads)
            times = self.problem.q.shape[1] // heads
            if times > 1:
                u = FLOAT32.u if a.shared_heads is None else a.shared_heads.u + FLOAT32.u
                u = u if a.softmax.precision <= FLOAT32.precision else a.softmax.u
                error = error * (1 + times * u) + times * u * size
                error = error + (0 if a.shared_heads is None else 2 * times * a.shared_heads.eta)
            if a.partial is not None:
                tiles = -(-self.problem.q.shape[2] // a.partial_queries)
                error = error * (1 + tiles * a.partial.u) + tiles * a.partial.eta
            return error
        if name == "dattn_bias":
            error = shrink(errors[name], value.shape)
            size = shrink(errors[f"abs_{name}"], value.shape)
            n = self._summed(value)
            return error + (n > 1) * (n * a.softmax.u * (size + error))
        if name == "dsinks":
            n = self.problem.q.shape[0] * self.problem.q.shape[2]
            error = errors[name].sum(axis=0)[:, 0, 0].astype(np.float64)
            return error + n * a.softmax.u * (value + error)
        return errors[name].astype(np.float64)

    def _variance(self, name, found, value):
        """And what is lost to one side."""
        a, u = self.arithmetic, self.arithmetic.softmax.u
        if name == "lse":
            return found["lse"][..., 0].astype(np.float64), 0.0
        if name in ("dk", "dv"):
            heads = self._shared(name)
            times = self.problem.q.shape[1] // heads
            variance, lost = self._sum(found[name], heads), self._sum(found[f"lost_{name}"], heads)
            size = self._sum(np.abs(found[f"abs_{name}"]), heads)
            squares = self._sum(found[f"abs_{name}"] ** 2, heads)
            n = chain(a, self.problem.q.shape[2])
            acc = a.accumulator.u * (2 if a.accumulator_truncates else 1)
            variance = variance + acc**2 / 3 * n / 3 * squares
            if a.accumulator_truncates:
                variance = variance + (0.25 * acc * n) ** 2 * (size + np.sqrt(squares)) ** 2
            if times > 1:
                variance = variance + times * FLOAT32.u**2 / 3 * size**2 * (u >= FLOAT32.u)
                if a.shared_heads is not None:
                    variance = variance + a.shared_heads.u**2 / 3 * (squares + (times - 1) * size**2)
                    variance = variance + (2 * times * a.shared_heads.eta) ** 2
            if a.partial is not None:
                tiles = -(-self.problem.q.shape[2] // a.partial_queries)
                variance = variance + a.partial.u**2 / 3 * (tiles / 3 + 1) * squares + tiles * a.partial.eta**2
            return variance, lost
        if name == "dattn_bias":
            n = self._summed(value)
            variance = shrink(found[name], value.shape)
            along_keys = value.ndim and value.shape[-1] == 1
            variance = variance + shrink(found[f"{'row' if along_keys else 'common'}_{name}"], value.shape)
            squares = shrink(found[f"abs_{name}"] ** 2, value.shape)
            variance = variance + (n > 1) * u**2 / 3 * (n * (value**2 / 3 + squares / 6) + squares)
            return variance, shrink(found[f"lost_{name}"], value.shape)
        if name == "dsinks":
            n = self.problem.q.shape[0] * self.problem.q.shape[2]
            variance, lost = (found[key].sum(axis=0)[:, 0, 0] for key in (name, f"lost_{name}"))
            return variance + n * u**2 / 3 * value**2, lost
        lost = found["lost" if name == "out" else f"lost_{name}"]
        return found[name].astype(np.float64), lost.astype(np.float64)

    def _shared(self, name):
        return self.call.args[1 if name == "dk" else 2].shape[1]

    def _sum(self, x, heads):
        return from_heads(x.astype(np.float64), heads, self.problem.rules.convention.gqa_order)

    def _summed(self, value):
        """How many numbers are summed to one of attn_bias."""
        return (self.problem.bias.size // max(1, value.size)) if self.problem.bias is not None else 1


def outside_the_model(call, values, arithmetic):
    """Why an arithmetic predicts nothing here, or nothing: what it stores may overflow."""
    q, k = (np.where(np.isfinite(x), x, 0) for x in call.args[:2])
    largest = min((f.largest for f in (arithmetic.scores, arithmetic.scaled_query) if f is not None), default=np.inf)
    if np.isfinite(largest):
        k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)  # which head meets which does not matter much
        scale = abs(call.options.get("scale") or 1 / np.sqrt(q.shape[-1]))
        products = (np.abs(q) @ np.abs(k).swapaxes(-1, -2)).max(initial=0) * max(1, scale)
        if products > largest:
            return f"scores of up to {products:.3g} may overflow {arithmetic.scores.name}"
    for name, value in values.items():
        form = {"out": arithmetic.out, "lse": arithmetic.lse}.get(name, arithmetic.grad)
        size = np.abs(value[np.isfinite(value)]).max(initial=0)
        if size > form.largest:
            return f"{name} of up to {size:.3g} overflows {form.name}"
    return ""
