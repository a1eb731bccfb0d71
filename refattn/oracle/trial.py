"""One call, judged: the candidate and the reference get the same numbers, and every array that is due has a verdict."""

import math
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.core import Call, leaves, tree_map
from refattn.oracle import contract
from refattn.oracle.arithmetic import Arithmetic, numpy_dtype
from refattn.oracle.bounds import attention_bounds, exact, outside_the_model, reference
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.compare import BUG, OUTSIDE, Bound, Verdict, compare
from refattn.oracle.inputs import cast, draw_dout, in_words, rounded
from refattn.oracle.noise import noise_bounds_of_call

STEP = 1e-200  # of the complex step along the scale


class Judge(NamedTuple):
    """What stays the same from call to call."""

    candidate: Any
    mechanism: Any
    run: Any  # refattn.oracle.contract.runner
    arithmetic: Arithmetic
    dtype: Any  # of all arrays that are handed over and come back; None: each has that of its own format
    gradients: bool


class Trial(NamedTuple):
    """One call, as it was judged."""

    call: Call  # in float64, numbers that the candidate's format holds
    family: str  # of inputs
    dout: Any  # a tree like the output, or None
    expected: dict  # name -> array: out, lse, dq, dparams.w1
    bounds: dict  # name -> Bound
    got: dict  # name -> array, or None where nothing came back
    verdicts: tuple
    words: str  # the call
    seed: tuple

    @property
    def conforms(self):
        return all(v.conforms for v in self.verdicts)

    @property
    def failed(self):
        """A verdict that accuses; OUTSIDE THE MODEL does not."""
        return any(v.kind not in ("CONFORMS", OUTSIDE) for v in self.verdicts)


def try_call(judge, call, family="example", chance=False, seed=(0,)):
    """The Trial of a call. `chance`: its numbers were drawn, so that the statistical bounds hold."""
    call = rounded(call, judge.arithmetic.inputs)
    words, dout = in_words(call, contract.parameter_names(judge.mechanism)), _cotangent(judge, call, family, seed)
    given = _given(judge, call, dout)
    before = {name: tree_map(np.copy, value) for name, value in given.items()}
    try:
        with np.errstate(all="ignore"):
            result, grads = _run(judge, call, given)
    except contract.NotHandled:
        raise
    except Exception as error:
        problem = Verdict("call", BUG, contract.raised(error), example=words)
        return Trial(call, family, dout, {}, {}, {}, (problem,), words, tuple(seed))
    canonical = as_dot_product(judge.mechanism, call)
    judged = _attention if canonical is not None else _by_noise
    due, along, outside = judged(judge, call, dout, result, grads, family if chance else "", seed)
    verdicts, constants = [], of_constants(judge.arithmetic)
    for name, expected, bound, got in due:
        if outside:
            verdicts.append(Verdict(name, OUTSIDE, outside, example=words))
            continue
        about = {"dtype": _dtype(judge, name), "example": words, "along": along.get(name), "constants": constants}
        verdicts.append(compare(expected, got, bound, name=name, **about))
    changed = [name for name, value in given.items() if not _identical(before[name], value)]
    if changed:
        problem = f"{', '.join(changed)}: changed by the candidate"
        verdicts.append(Verdict("arguments", BUG, problem, example=words))
    expected, bounds, got = ({row[0]: row[i] for row in due} for i in (1, 2, 3))
    return Trial(call, family, dout, expected, bounds, got, tuple(verdicts), words, tuple(seed))


def of_constants(arithmetic):
    """How far the rounding of a few constants may push everything, relatively."""
    formats = [f for f in (arithmetic.softmax, arithmetic.scores, arithmetic.scaled_query) if f is not None]
    return max(arithmetic.exp_error, *(4 * form.u for form in formats))


# --- what the candidate is given ------------------------------------------------------------------------------


def _cotangent(judge, call, family, seed):
    if not judge.gradients:
        return None
    out, _ = judge.mechanism.forward(*call.args, **call.options)
    if as_dot_product(judge.mechanism, call) is not None and isinstance(out, tuple):
        out = out[0]
    dout = draw_dout(judge.mechanism, family, out, np.random.default_rng([*seed, 1]))
    return rounded(Call((dout,), {}), judge.arithmetic.out).args[0]


def _given(judge, call, dout):
    dtype = judge.dtype or numpy_dtype(judge.arithmetic.inputs)
    names = contract.parameter_names(judge.mechanism)
    options = {name: cast(value, dtype) for name, value in _options(judge, call).items()}
    dout = cast(dout, judge.dtype or numpy_dtype(judge.arithmetic.out))
    return dict(zip(names, cast(call.args, dtype))) | options | {"dout": dout}


def _options(judge, call):
    return contract.handed_over(judge.candidate, call, contract.off_by_default(judge.mechanism))


def _run(judge, call, given):
    names = contract.parameter_names(judge.mechanism)[: len(call.args)]
    options = {name: given[name] for name in _options(judge, call)}
    return judge.run(judge.candidate, [given[name] for name in names], options, given["dout"])


def _dtype(judge, name):
    if name == "lse":
        return None  # some keep it in float32, others in what they store
    form = judge.arithmetic.grad if name.startswith("d") and name != "d" else judge.arithmetic.out
    return judge.dtype or numpy_dtype(form)


# --- what is due: rows of (name, expected, bound, what the candidate has there or None) -------------------------


TOGETHER = "gaussian"  # the family on whose numbers all errors of an array are judged together, too


def _attention(judge, call, dout, result, grads, family, seed):
    """Of dot-product attention, by the closed form; lse is judged wherever it comes back.

    `family` is that of numbers left to chance, or "".
    """
    canonical = as_dot_product(judge.mechanism, call)
    wide = None if dout is None else dout.reshape(*canonical.args[0].shape[:3], dout.shape[-1])
    values = reference(canonical, wide)
    outside = outside_the_model(canonical, values, judge.arithmetic)
    bounds, tiers = {}, ("worst", "stat") if family else ("worst",)
    if not outside:
        bounds = attention_bounds(canonical, wide, judge.arithmetic, tiers, values)
    several = isinstance(result, (tuple, list))
    theirs = {"out": (result[0] if len(result) else None) if several else result}
    shapes = {"out": (*call.args[0].shape[:-1], call.args[2].shape[-1]), "lse": call.args[0].shape[:-1]}
    if several and len(result) > 1 and result[1] is not None:
        theirs["lse"] = result[1]
    names = contract.parameter_names(judge.mechanism)
    for i, (name, x) in enumerate(zip(names, call.args)):
        if dout is not None and x is not None:
            theirs[f"d{name}"], shapes[f"d{name}"] = _child(grads, i, i), x.shape

    def shaped(name, x):
        return None if x is None else x.reshape(shapes[name])

    a = judge.arithmetic
    one_sided = a.operands_truncate or a.accumulator_truncates
    together = family == TOGETHER and not one_sided
    poison = _poisoned(canonical, wide)
    due, along = [], {}
    for name, got in theirs.items():
        bound = bounds.get(name, Bound())
        bound = Bound(*(shaped(name, x) for x in (bound if together else bound._replace(sd=None))))
        expected = shaped(name, values[name])
        if poison is not None and np.shape(got) == expected.shape:
            expected = _with_poison(name, expected, np.isnan(got), *(shaped(name, x[name]) for x in poison))
        due.append((name, expected, bound, got))
    if together and not outside:
        along["out"] = {"along the scale, by {:.2g} of it": shaped("out", _along_scale(canonical))}
    return due, along, outside


def _poisoned(call, dout):
    """What comes of a call with NaN where masked keys are left out, and where a mask is added; None without NaN."""
    if all(np.isfinite(x).all() for x in call.args[:3]):
        return None
    said = call.options.get("convention")
    asked = exact(said)
    left_out = asked._replace(masked_values="skip", mask_op="replace")
    added = asked if said is not None else asked._replace(masked_values="multiply", mask_op="add")
    if said is not None and said.mask_op == "add":  # to whatever number is added to it, NaN stays NaN
        added = asked._replace(mask_op="add", mask_value=-math.inf, fully_masked="zero")
    return [reference(call._replace(options=call.options | {"convention": c}), dout) for c in (left_out, added)]


def _with_poison(name, expected, nan, left_out, added):
    """What is expected of a candidate that has NaN there.

    Nobody promises whether what is masked is multiplied by 0, so that NaN survives, added to, or skipped, unless a
    convention is asked for; a kernel of tiles does both. And how far NaN spreads in gradients nobody promises at all.
    """
    gradient = name.startswith("d")
    expected = np.where(~nan & np.isnan(expected), left_out, expected)
    return np.where(nan & (np.isnan(added) | gradient), np.nan, expected)


def _along_scale(call):
    """How `out` changes with the logarithm of the scale, by a complex step in q."""
    q, *others = call.args
    options = call.options | {"convention": exact(call.options.get("convention")), "return_lse": False}
    with np.errstate(all="ignore"):
        y, _ = dot_product_attention.forward(q + 1j * STEP * q, *others, **options)
    return np.nan_to_num(y.imag / STEP, nan=0, posinf=0, neginf=0)


def _by_noise(judge, call, dout, result, grads, family, seed):
    mechanism, names = judge.mechanism, contract.parameter_names(judge.mechanism)
    out, saved = mechanism.forward(*call.args, **call.options)
    expected = None if dout is None else tuple(mechanism.backward(dout, saved))
    bounds, grad_bounds = noise_bounds_of_call(mechanism, call, dout, (out, expected), judge.arithmetic, list(seed))
    if not isinstance(out, tuple) and isinstance(result, (tuple, list)):
        result = result[0] if result else None
    due = list(_walk(out, bounds, result, "" if isinstance(out, tuple) else "out"))
    for i, name in enumerate(names[: len(expected or ())]):
        due += _walk(expected[i], grad_bounds[i], _child(grads, i, i), f"d{name}")
    return due, {}, ""


def _walk(expected, bounds, theirs, name):
    """Yield a row for every array of a tree."""
    if isinstance(expected, tuple):
        for i, field in enumerate(getattr(expected, "_fields", range(len(expected)))):
            below = f"{name}.{field}" if name else str(field)
            yield from _walk(expected[i], bounds[i], _child(theirs, i, field), below)
    elif expected is not None:
        yield name, expected, bounds, theirs


def _child(tree, i, field):
    if isinstance(tree, dict):
        return tree.get(field)
    return tree[i] if isinstance(tree, (tuple, list)) and i < len(tree) else None


def _identical(before, after):
    pairs = zip(leaves(before), leaves(after), strict=True)
    return all(np.array_equal(a, b, equal_nan=np.asarray(b).dtype.kind in "fV") for (_, a), (_, b) in pairs)


def plain(record):
    """A record whose NaN and inf are words, as JSON wants them."""

    def word(x):
        return x if not isinstance(x, (float, complex)) or (isinstance(x, float) and math.isfinite(x)) else str(x)

    return {name: word(x) for name, x in record.items()}
