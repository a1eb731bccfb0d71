"""The whole trial: of somebody's function against a reference, and of a mechanism against its laws.

    report = refattn.check(my_attention, like="scaled_dot_product")
    assert report.ok, str(report)
"""

import json
import math
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refattn.core import leaves, tree_map
from refattn.draw import RandomDraw
from refattn.oracle.noise import allowed_of_call
from refattn.oracle.compare import Verdict, compare
from refattn.oracle.contract import NotHandled, claim, claimed, exercised, parameter_names, runner
from refattn.oracle.derivatives import Inconclusive, complex_step
from refattn.oracle.inputs import cast, draw_call, in_words, rounded
from refattn.oracle.laws import gradient_errors, laws_of
from refattn.registry import find

# --- a candidate against the reference -----------------------------------------------------------------------


class Report(NamedTuple):
    """What came of a trial; `verdicts` has the worst of all examples for each array: out, dq, dk, dparams.w1, ..."""

    candidate: str
    like: str
    framework: str
    dtype: str
    seed: int
    verdicts: dict  # name -> Verdict
    failures: dict  # name -> in how many examples it does not conform
    examples: int  # judged
    passed_over: dict  # reason -> how many examples
    never: tuple  # arguments and options that were never exercised
    gradients: str  # "judged", or why not

    @property
    def ok(self):
        """True only if something was judged, and all of it conforms."""
        return self.examples > 0 and all(v.conforms for v in self.verdicts.values())

    def __str__(self):
        word = "conforms" if self.ok else "DIFFERS" if self.examples else "NOT JUDGED"
        lines = [f"{self.candidate} like {self.like}, {self.framework} {self.dtype}: {word} ({self.examples} examples)"]
        width = max(map(len, self.verdicts), default=0)
        for name, verdict in self.verdicts.items():
            lines.append(f"  {'ok  ' if verdict.conforms else 'FAIL'} {name:{width}}  {verdict}")
            if not verdict.conforms:
                lines.append(f"       {'':{width}}  so in {self.failures[name]} examples; here {verdict.example}")
        if self.gradients != "judged":
            lines.append(f"  gradients are not judged: {self.gradients}")
        if self.never:
            lines.append(f"  never exercised: {', '.join(self.never)}")
        lines += [f"  passed over {count} examples: {reason}" for reason, count in self.passed_over.items()]
        return "\n".join(lines)

    def as_dict(self):
        verdicts = {name: _plain(v._asdict()) for name, v in self.verdicts.items()}
        return {"ok": self.ok} | self._asdict() | {"verdicts": verdicts}

    def to_json(self):
        """The report as JSON; NaN and inf are written as words."""
        return json.dumps(self.as_dict(), indent=1)


def check(
    candidate,
    like,
    *,
    framework=None,
    dtype=np.float32,
    gradients=True,
    backward=None,
    example=None,
    max_examples=32,
    seed=0,
    name=None,
):
    """Try `candidate` against the mechanism `like`: a name, or anything with forward, backward and example.

    What a candidate is and gives back: see refattn.oracle.contract. Inputs are drawn (by `example`, if given, in place
    of the mechanism's own) and rounded to `dtype`; the reference computes in float64 from exactly those.
    `framework="torch"` hands tensors over, and autograd answers for the gradients.
    """
    mechanism, dtype = find(like) if isinstance(like, str) else like, np.dtype(dtype)
    if dtype not in (np.float64, np.float32, np.float16):
        raise ValueError(f"check: dtype is {dtype}, expected float64, float32 or float16")
    how = "judged" if gradients else "not asked for"
    if gradients and framework in (None, "numpy") and backward is None:
        how = "no backward is given"
    run, taken = runner(framework, backward), claim(candidate, mechanism)
    verdicts, failures, passed_over, known, judged = {}, Counter(), Counter(), set(), 0
    for i in range(20 * max_examples):
        if judged == max_examples:
            break
        try:
            drawn = draw_call(mechanism, example or mechanism.example, [seed, i])
            call = rounded(claimed(drawn, taken, mechanism), dtype)
            found = judge(run, candidate, mechanism, call, dtype, how == "judged", [seed, i])
        except NotHandled as reason:
            passed_over[str(reason) or "not handled"] += 1
            continue
        judged += 1
        known |= exercised(call, mechanism)
        for verdict in found:
            failures[verdict.name] += not verdict.conforms
            verdicts[verdict.name] = max(verdicts.get(verdict.name, verdict), verdict, key=_badness)
    return Report(
        candidate=name or getattr(candidate, "__name__", repr(candidate)),
        like=str(getattr(mechanism, "name", mechanism)),
        framework=framework or "numpy",
        dtype=str(dtype),
        seed=seed,
        verdicts=verdicts,
        failures=dict(failures),
        examples=judged,
        passed_over=dict(passed_over),
        never=tuple(p for p in parameter_names(mechanism) if p not in known),
        gradients=how,
    )


def assert_conforms(candidate, like, **options):
    """`check`, for tests: an AssertionError with the whole report if anything differs."""
    report = check(candidate, like, **options)
    assert report.ok, str(report)
    return report


def judge(run, candidate, mechanism, call, dtype, gradients, seed):
    """The verdicts on one call: on each output, each gradient, and on the candidate's manners."""
    names = parameter_names(mechanism)
    out, saved = mechanism.forward(*call.args, **call.options)
    dout = grads = None
    if gradients:
        rng = np.random.default_rng(seed)
        dout = cast(cast(tree_map(lambda y: rng.normal(size=y.shape), out), dtype), np.float64)
        grads = tuple(mechanism.backward(dout, saved))
    given = dict(zip(names, cast(call.args, dtype))) | {k: cast(v, dtype) for k, v in call.options.items()}
    given["dout"] = cast(dout, dtype)
    before = {name: tree_map(np.copy, value) for name, value in given.items()}
    args, options = [given[n] for n in names[: len(call.args)]], {k: given[k] for k in call.options}
    down = in_words(call, names)
    try:
        with np.errstate(all="ignore"):
            result, their_grads = run(candidate, args, options, given["dout"])
    except NotHandled:
        raise
    except Exception as error:
        return [Verdict("call", False, _raised(error), example=down)]
    allowed, allowed_grads = allowed_of_call(mechanism, call, dout, (out, grads), dtype, seed)
    if not isinstance(out, tuple) and isinstance(result, (tuple, list)):
        result = result[0] if result else None
    due = list(_due(out, allowed, result, "" if isinstance(out, tuple) else "out"))
    for i, name in enumerate(names[: len(grads or ())]):
        due += _due(grads[i], allowed_grads[i], _child(their_grads, i, i), f"d{name}")
    verdicts = [compare(y, got, a, name=name, dtype=dtype)._replace(example=down) for name, y, a, got in due]
    changed = [name for name, value in given.items() if not _identical(before[name], value)]
    if changed:
        verdicts.append(Verdict("arguments", False, f"{', '.join(changed)}: changed by the candidate", example=down))
    return verdicts


def _due(expected, allowed, theirs, name):
    """Yield (name, expected, allowed, what the candidate has there or None) for every array that is due."""
    if isinstance(expected, tuple):
        for i, field in enumerate(getattr(expected, "_fields", range(len(expected)))):
            below = f"{name}.{field}" if name else str(field)
            yield from _due(expected[i], allowed[i], _child(theirs, i, field), below)
    elif expected is not None:
        yield name, expected, allowed, theirs


def _child(tree, i, field):
    if isinstance(tree, dict):
        return tree.get(field)
    return tree[i] if isinstance(tree, (tuple, list)) and i < len(tree) else None


def _identical(before, after):
    pairs = zip(leaves(before), leaves(after), strict=True)
    return all(np.array_equal(a, b, equal_nan=np.asarray(b).dtype.kind == "f") for (_, a), (_, b) in pairs)


def _badness(verdict):
    return not verdict.conforms, bool(verdict.problem), verdict.ratio


def _raised(error):
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _plain(record):
    def plain(x):
        return x if not isinstance(x, (float, complex)) or (isinstance(x, float) and math.isfinite(x)) else str(x)

    return {name: plain(x) for name, x in record.items()}


# --- a mechanism against its laws ----------------------------------------------------------------------------


class LawReport(NamedTuple):
    """What came of trying a mechanism against its laws."""

    name: str
    family: str
    worst: float  # gradient error: <J'dout, v> against <dout, J v>, relative to their terms
    laws: int
    examples: int
    inconclusive: int  # of all laws and examples: a kink lay within a step of the differences
    failures: tuple  # in words, one per law
    witnesses: tuple

    @property
    def ok(self):
        return not self.failures

    def __str__(self):
        lines = [f"{self.name}: {'conforms' if self.ok else 'FAILS'} ({self.laws} laws, {self.examples} examples)"]
        return "\n".join(lines + [f"  {failure}" for failure in self.failures])

    def as_dict(self):
        return {"ok": self.ok} | _plain(self._asdict())


def check_laws(mechanism, examples=10, seed=0):
    """Every law of a mechanism, on calls that it draws itself."""
    laws, errors, failures, inconclusive = laws_of(mechanism), [], {}, 0

    def gradient(mechanism, call, rng):
        for _, ours, theirs, allowed in gradient_errors(mechanism, call, rng, complex_step, rtol=1e-12):
            errors.append(1e-12 * abs(ours - theirs) / allowed)

    for i in range(examples):
        for law in (*laws, gradient):
            try:
                law(mechanism, mechanism.example(RandomDraw([seed, i])), np.random.default_rng([seed, i]))
            except Inconclusive:
                inconclusive += 1
            except Exception as error:
                story = str(error) if isinstance(error, AssertionError) else f"{mechanism}: {_raised(error)}"
                failures.setdefault(law.__name__, f"{law.__name__}, example {i} of seed {seed}: {story}")
    return LawReport(
        name=mechanism.name,
        family=mechanism.family,
        worst=float(np.max(errors, initial=0)),
        laws=len(laws),
        examples=examples,
        inconclusive=inconclusive,
        failures=tuple(failures.values()),
        witnesses=tuple(mechanism.ABOUT.witnesses),
    )
