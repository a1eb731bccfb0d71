"""The whole trial of somebody's function against a reference.

    report = refattn.check(my_attention, like="dot_product_attention", arithmetic="bf16_flash")
    assert report.ok, str(report)
"""

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.oracle import contract, inputs
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT64, FORMATS, OF_DTYPE, Arithmetic, ladder
from refattn.oracle.behaviour import check_behaviour
from refattn.oracle.bounds import attention_bounds
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.compare import BUG, OUTSIDE, worse
from refattn.oracle.conventions import PRESETS
from refattn.oracle.diagnose import explain
from refattn.oracle.noise import granularity
from refattn.oracle.region import region
from refattn.oracle.shrink import shrink
from refattn.oracle.trial import Judge, plain, try_call
from refattn.registry import find

EXPLAINED = 8  # failing calls that an explanation must explain, and conforming ones that it must not spoil
EXAMPLES, OF_EACH = 32, 4  # unless asked for otherwise: so many calls, and of each family
BEHAVED = 2  # calls on which each law of behaviour is tried
SHOWN = 2**14  # numbers in the arrays of a call of which there are maps
EXPLAINED_BY_NOISE = 3  # where a bound takes many runs


class Report(NamedTuple):
    """What came of a trial; `verdicts` has the worst of all examples for each array: out, lse, dq, dparams.w1, ..."""

    candidate: str
    like: str
    framework: str
    dtype: str
    arithmetic: str
    convention: str
    seed: int
    verdicts: dict  # name -> Verdict
    failures: dict  # name -> in how many examples it does not conform
    examples: int  # judged
    families: dict  # of inputs: name -> how many examples
    outside: dict  # why nothing is predicted -> how many examples
    passed_over: dict  # reason -> how many examples
    departures: dict  # page in docs/findings -> how many examples of those passed over
    never: tuple  # arguments and options that were never exercised
    gradients: str  # "judged", or why not
    explanations: tuple = ()  # named mistakes and conventions that explain everything, best first
    consistent_with: str = ""  # a coarser arithmetic that does
    where: str = ""  # the region of the error, in words
    smallest: Any = None  # a Trial that fails, shrunk
    largest: Any = None  # one that fails, as it was drawn: for maps of the error
    behaviour: tuple = ()  # (law of refattn.oracle.behaviour, "" or what breaks it), of those that were tried
    accuracy: float = 0.0  # the reference's own error is at most this part of the bounds
    spec: Any = None  # (module, name) of the candidate, for script()
    version: str = ""  # of the framework, or of NumPy
    device: str = "cpu"  # on which the candidate computed

    @property
    def ok(self):
        """True only if something was judged, and all of it conforms."""
        conforms = all(v.conforms for v in self.verdicts.values())
        return self.examples > 0 and conforms and not any(problem for _, problem in self.behaviour)

    def __str__(self):
        word = "conforms" if self.ok else "DIFFERS" if self.examples else "NOT JUDGED"
        promise = "" if self.arithmetic == self.dtype else f", arithmetic {self.arithmetic}"
        promise += f", convention {self.convention}" if self.convention else ""
        head = f"{self.candidate} like {self.like}, {self.framework} {self.dtype}{promise}"
        lines = [f"{head}: {word} ({self.examples} examples)"]
        width = max(map(len, self.verdicts), default=0)
        kinds, shown = max((len(_kind(v)) for v in self.verdicts.values()), default=0), None
        for name, verdict in self.verdicts.items():
            lines.append(f"  {_kind(verdict):{kinds}}  {name:{width}}  {verdict}")
            if not verdict.conforms:
                here = "there too" if verdict.example == shown else f"here {verdict.example}"
                lines.append(f"  {'':{kinds}}  {'':{width}}  so in {self.failures[name]} examples; {here}")
                shown = verdict.example
        lines += [f"  BROKEN {law}: {problem}" for law, problem in self.behaviour if problem]
        lines += [f"  explained by {e.name}: {e.words}" for e in self.explanations]
        if self.consistent_with:
            lines.append(f"  consistent with {self.consistent_with}")
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.smallest is not None:
            lines.append(f"  smallest case: {self.smallest.words}")
        if self.gradients != "judged":
            lines.append(f"  gradients are not judged: {self.gradients}")
        if self.never:
            lines.append(f"  never exercised: {', '.join(self.never)}")
        lines += [f"  outside the model, {count} examples: {reason}" for reason, count in self.outside.items()]
        lines += [f"  passed over {count} examples: {reason}" for reason, count in self.passed_over.items()]
        lines += [f"  departs, as is known: docs/findings/{finding}.md" for finding in self.departures]
        if self.framework != "numpy" and self.version:
            lines.append(f"  with {self.framework} {self.version} on {self.device}")
        if self.accuracy:
            lines.append(f"  the reference's own error is at most {self.accuracy:.1e} of what is allowed")
        return "\n".join(lines)

    def as_dict(self):
        """Everything but the arrays."""
        record = self._asdict() | {"verdicts": {name: plain(v._asdict()) for name, v in self.verdicts.items()}}
        record |= {"explanations": [e._asdict() for e in self.explanations]}
        for name in ("smallest", "largest"):
            record[name] = None if record[name] is None else record[name].words
        return {"ok": self.ok} | plain(record)

    def to_json(self):
        """The report as JSON; NaN and inf are written as words."""
        return json.dumps(self.as_dict(), indent=1)

    def to_html(self):
        """The report as one page, with maps of error over bound; needs matplotlib."""
        from refattn.oracle.html import page

        return page(self)

    def script(self):
        """A few lines that reproduce the smallest failure with NumPy and the candidate alone; "" if nothing fails."""
        from refattn.oracle.reproduce import script

        return "" if self.smallest is None else script(self)


def _kind(verdict):
    return "ok" if verdict.conforms else verdict.kind


def check(
    candidate,
    like,
    *,
    framework=None,
    convention=None,
    arithmetic=None,
    dtype=None,
    gradients=True,
    backward=None,
    example=None,
    families=None,
    max_examples=None,
    seed=0,
    name=None,
    spec=None,
    device="cpu",
    progress=None,
):
    """Try `candidate` against the mechanism `like`: a name, or anything with forward, backward and example.

    What a candidate is and gives back: see refattn.oracle.contract. Inputs are drawn, of all `families` of
    refattn.oracle.inputs unless some are named, or by `example` in place of the mechanism's own; they are rounded to
    the format of the inputs, and the reference computes in float64 from exactly those.

    `arithmetic` is what the candidate promises: a name of refattn.oracle.arithmetic.ARITHMETICS, or an Arithmetic.
    Without it, what frameworks do in `dtype` (float32 unless given). With both, `dtype` is that of the arrays.
    `convention`, a name of refattn.oracle.conventions.PRESETS or a Convention, is for like="dot_product_attention".
    `framework="torch"` hands tensors over, and autograd answers for the gradients. `device`, for the report, is where
    the candidate computes. `progress(done)` is called after every example.
    """
    mechanism = find(like) if isinstance(like, str) else like
    arithmetic, dtype = settle_arithmetic(arithmetic, dtype)
    convention, convention_name = _settle_convention(convention, mechanism)
    how = "judged" if gradients else "not asked for"
    if gradients and framework in (None, "numpy") and backward is None:
        how = "no backward is given"
    run, claim = contract.runner(framework, backward), contract.claim(candidate, mechanism)
    judge = Judge(candidate, mechanism, run, arithmetic, dtype, how == "judged")
    draws = _families(families, mechanism, example)
    max_examples = usual_examples(mechanism, families) if max_examples is None else max_examples
    trials, outside, passed_over, departures, known, count = [], Counter(), Counter(), Counter(), set(), Counter()
    for i in range(20 * max_examples):
        if len(trials) == max_examples:
            break
        family, (draw, generic) = list(draws.items())[i % len(draws)]
        try:
            call = draw(claim, [seed, i])
            if call is None:
                continue
            call = contract.claimed(call, claim, mechanism)
            if convention is not None:
                call = call._replace(options=call.options | {"convention": convention})
            trial = try_call(judge, call, family, generic, [seed, i])
        except contract.NotHandled as reason:
            passed_over[str(reason) or "not handled"] += 1
            if isinstance(reason, contract.Departure):
                departures[reason.finding] += 1
            continue
        outside.update({v.problem for v in trial.verdicts if v.kind == OUTSIDE})
        if any(v.kind != OUTSIDE for v in trial.verdicts):
            trials.append(trial)
            count[family] += 1
            known |= contract.exercised(call, mechanism)
            if progress is not None:
                progress(len(trials))
    return _report(
        *(judge, trials, backward),
        candidate=name or getattr(candidate, "__name__", repr(candidate)),
        like=str(getattr(mechanism, "name", mechanism)),
        framework=framework or "numpy",
        dtype=arithmetic.inputs.name if dtype is None else str(dtype),
        arithmetic=arithmetic.name,
        convention=convention_name,
        seed=seed,
        examples=len(trials),
        families=dict(count),
        outside=dict(outside),
        passed_over=dict(passed_over),
        departures=dict(departures),
        never=tuple(p for p in contract.parameter_names(mechanism) if p not in known),
        gradients=how,
        spec=spec or _spec(candidate, backward),
        version=contract.version(framework),
        device=device,
    )


def assert_conforms(candidate, like, **options):
    """`check`, for tests: an AssertionError with the whole report if anything differs."""
    report = check(candidate, like, **options)
    assert report.ok, str(report)
    return report


def _report(judge, trials, backward, **known):
    verdicts, failures = {}, Counter()
    for verdict in sorted((v for t in trials for v in t.verdicts), key=lambda v: v.kind == OUTSIDE):
        if verdict.kind != OUTSIDE or verdict.name not in verdicts:  # where it is judged elsewhere, that counts
            failures[verdict.name] += not verdict.conforms
            verdicts[verdict.name] = max(verdicts.get(verdict.name, verdict), verdict, key=worse)
    report = Report(verdicts=verdicts, failures=dict(failures), accuracy=_accuracy(judge, trials), **known)
    failed = sorted((t for t in trials if t.failed), key=_size)
    if not failed:
        return report._replace(behaviour=_behaviour(judge, trials, backward, known))
    smallest = shrink(judge, failed[0])
    some = EXPLAINED if as_dot_product(judge.mechanism, failed[0].call) is not None else EXPLAINED_BY_NOISE
    shown = [smallest, *failed[:some], *[t for t in trials if not t.failed][:some]]
    return report._replace(
        smallest=smallest,
        largest=max(failed, key=lambda t: (_size(t)[0] <= SHOWN, _size(t))),
        explanations=explain(judge.mechanism, shown, judge.arithmetic),
        consistent_with=_coarser(judge, failed[:some]),
        where=region(failed[0]),
    )


def _behaviour(judge, trials, backward, known):
    """What is wrong between calls, if nothing is within them; of dot-product attention."""
    if not any(trial.family in inputs.FAMILIES for trial in trials):
        return ()
    found = check_behaviour(
        *(judge.candidate, judge.mechanism),
        framework=known["framework"],
        backward=backward,
        gradients=judge.gradients,
        convention=trials[0].call.options.get("convention"),
        arithmetic=judge.arithmetic,
        dtype=judge.dtype,
        examples=BEHAVED,
        seed=known["seed"],
    )
    return tuple(found.items())


def _size(trial):
    return sum(np.size(x) for x in trial.expected.values()), trial.words


def _coarser(judge, failed):
    """The first coarser arithmetic, in words, in which all that failed conforms."""
    wrong = {"call", "arguments"} | {v.name for t in failed for v in t.verdicts if not np.isfinite(v.ratio)}
    if any(v.name in wrong or (v.problem and v.kind == BUG) for t in failed for v in t.verdicts if not v.conforms):
        return ""  # no rounding does that
    by_noise = as_dot_product(judge.mechanism, failed[0].call) is None
    tried = {granularity(judge.arithmetic)}
    for words, arithmetic in ladder(judge.arithmetic):
        if by_noise and granularity(arithmetic) in tried:
            continue
        tried.add(granularity(arithmetic))
        coarse = judge._replace(arithmetic=arithmetic)
        if all(try_call(coarse, t.call, t.family, False, t.seed).conforms for t in failed):
            return words
    return ""


def _accuracy(judge, trials):
    """The largest error of the reference itself as a part of the bound, in the first call of each family."""
    most, exact, seen = 0.0, ARITHMETICS["float64"], set()
    for trial in trials:
        canonical = as_dot_product(judge.mechanism, trial.call)
        if canonical is None or trial.family in seen or not trial.bounds or judge.arithmetic.inputs == FLOAT64:
            continue
        seen.add(trial.family)
        dout = None if trial.dout is None else trial.dout.reshape(*canonical.args[0].shape[:3], trial.dout.shape[-1])
        for name, ours in attention_bounds(canonical, dout, exact, ("worst",)).items():
            allowed = trial.bounds.get(name)
            if allowed is not None and allowed.least is not None:
                with np.errstate(all="ignore"):
                    part = ours.worst.reshape(allowed.least.shape) / allowed.least
                most = max(most, np.nanmax(np.where(allowed.least > 0, part, 0), initial=0))
    return float(most)


# --- what was asked for ---------------------------------------------------------------------------------------


def settle_arithmetic(arithmetic, dtype):
    """(Arithmetic, the NumPy dtype of all arrays or None) from what `check` was given."""
    if isinstance(arithmetic, str):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"check: arithmetic is {arithmetic!r}, expected one of {', '.join(ARITHMETICS)}")
        arithmetic = ARITHMETICS[arithmetic]
    if arithmetic is not None and not isinstance(arithmetic, Arithmetic):
        raise ValueError(f"check: arithmetic is {arithmetic!r}, expected a name or an Arithmetic")
    form = None
    if dtype is not None:
        form = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        if form not in OF_DTYPE and not (arithmetic is not None and form in FORMATS):
            raise ValueError(f"check: dtype is {form}, expected {', '.join(OF_DTYPE)}")
    if arithmetic is None:
        return ARITHMETICS[OF_DTYPE[form or "float32"]], None
    if form is None or form == arithmetic.inputs.name == arithmetic.out.name:
        return arithmetic, None
    for stored in (arithmetic.inputs, arithmetic.out, arithmetic.grad):
        wide = FORMATS[form]
        if wide.precision < stored.precision or wide.largest < stored.largest or wide.least > stored.least:
            raise ValueError(f"check: dtype is {form}, expected one that holds {stored.name} ({arithmetic.name})")
    return arithmetic, np.dtype(form)


def _settle_convention(convention, mechanism):
    if convention is None:
        return None, ""
    if "convention" not in contract.parameter_names(mechanism):
        raise ValueError(f"check: convention is {convention!r}, expected none: {mechanism} has no such option")
    if isinstance(convention, str):
        if convention not in PRESETS:
            raise ValueError(f"check: convention is {convention!r}, expected one of {', '.join(PRESETS)}")
        return PRESETS[convention], convention
    if not isinstance(convention, Convention):
        raise ValueError(f"check: convention is {convention!r}, expected a name or a Convention")
    return convention, next((name for name, c in PRESETS.items() if c == convention), str(convention))


def usual_examples(mechanism, families=None):
    """How many calls `check` tries unless it is told."""
    return max(EXAMPLES, OF_EACH * len(_families(families, mechanism, None)))


def _families(families, mechanism, example):
    """{name: (draw(claim, seed), whether chance has the say)}."""
    if example is not None:
        return {"example": (lambda claim, seed: inputs.draw_call(mechanism, example, seed), False)}
    known = inputs.families(mechanism)
    wanted = list(known) if families is None else [families] if isinstance(families, str) else list(families)
    for family in wanted:
        if family not in known:
            raise ValueError(f"check: families has {family!r}, expected some of {', '.join(known)}")

    def drawn(family):
        return lambda claim, seed: inputs.draw(mechanism, family, claim, seed)

    return {family: (drawn(family), known[family].generic) for family in wanted}


def _spec(*functions):
    """(module, name) of each, where a script can import them."""
    found = [(getattr(f, "__module__", None), getattr(f, "__qualname__", "")) for f in functions if f is not None]
    return sum(found, ()) if all(module and name.isidentifier() for module, name in found) else None
