"""Why a candidate fails: a named mistake, or another convention, that explains all that it gave.

    explain(mechanism, trials, arithmetic)      (Explanation("d_missing", "backward does not subtract ..."), ...)

An explanation predicts other arrays than the reference. It holds if every array that came back, in every trial, those
that conform too, is within the bounds of its prediction; if somewhere the prediction is outside the bounds of the
reference, so that the two can be told apart; and if what is wrong is nearer to it, by half at least, in sum and in
units of the bounds. The simplest comes first.

Bounds of a prediction: where it is what the reference answers to another call, those of that call. Else the largest of
the reference's own for that array, times how much larger the predicted array is: no theorem, but mistakes are rarely
that small.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from refattn.core import tree_map
from refattn.draw import RandomDraw
from refattn.oracle import contract, mistakes
from refattn.oracle.bounds import GRADIENTS, attention_bounds, exact, reference
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.compare import OUTSIDE, Bound
from refattn.oracle.conventions import PRESETS
from refattn.oracle.mistakes import MISTAKES, Case, Mistake, pulled_back
from refattn.oracle.noise import noise_bounds_of_call

MOST = 5  # explanations
LOOSE = 1024.0  # a first look: a residual beyond this many times the largest bound is not worth a bound of its own
PAIRS = 100  # of mistakes, at most, whose output is worth a second look
LOOKED_AT = 3  # trials that fail, for such pairs
UNDONE = 8.0  # one of them may change the output by so many times what is wrong in the end
SMALL = 2**18  # scores of a trial for which they are computed
DRAWS = 48  # examples, to see which values an option may have


class Explanation(NamedTuple):
    name: str
    words: str


class Judged(NamedTuple):
    """A trial, as explanations see it; arrays of dot-product attention have the axes (B, H, ...)."""

    case: Case
    got: dict  # what came back and can be judged, {name: array}
    allowed: dict  # {name: array}
    outside: dict  # {name: where it is wrong}
    tiers: tuple

    @property
    def fails(self):
        return any(x.any() for x in self.outside.values())

    @property
    def size(self):
        return sum(x.size for x in self.got.values())


def explain(mechanism, trials, arithmetic):
    """At most MOST Explanations, the simplest first; none if nothing fails, or nothing explains it."""
    with np.errstate(all="ignore"):
        judged = [j for j in (_judged(mechanism, t) for t in trials) if j.got]
        judged = sorted(judged, key=lambda j: (not j.fails, j.size))
        if not judged or not judged[0].fails:
            return ()
        known, attention = {}, bool(judged[0].tiers)
        judged = [j for j in judged if bool(j.tiers) == attention]  # calls that return scores are of the other kind
        found = _attention(judged, arithmetic, known) if attention else _options(mechanism, judged, arithmetic)
        found += [] if len(found) >= MOST else _arrays(mechanism, judged)
        if not found and attention:
            found = _pairs(judged, arithmetic, known)
    return tuple(found[:MOST])


# --- trials ---------------------------------------------------------------------------------------------------


def _judged(mechanism, trial):
    canonical = as_dot_product(mechanism, trial.call)
    passed = {v.name for v in trial.verdicts if v.kind == OUTSIDE}
    got, allowed, outside = {}, {}, {}
    call, dout, values, tiers = trial.call, trial.dout, trial.expected, ()
    if canonical is not None:
        call, (b, h, t, _) = canonical, canonical.args[0].shape
        dout = None if dout is None else dout.reshape(b, h, t, dout.shape[-1])
        values = reference(call, dout)
        stat = all(bound.stat is not None for bound in trial.bounds.values())
        tiers = ("worst", "stat")[: 1 + stat]
    for name, x in trial.got.items():
        bound = trial.bounds.get(name)
        expected = trial.expected.get(name)
        if name in passed or name not in values or bound is None or bound.least is None or not _fits(x, expected):
            continue
        shape = values[name].shape
        got[name] = np.asarray(x).astype(np.float64).reshape(shape)
        allowed[name] = np.broadcast_to(bound.least, expected.shape).reshape(shape)
        outside[name] = ~_within(got[name], values[name], allowed[name])
    return Judged(Case(call, dout, values), got, allowed, outside, tiers)


def _fits(x, expected):
    """Whether there is an array of the right shape to compare, whatever its dtype."""
    is_array = isinstance(x, (np.ndarray, np.generic)) and expected is not None
    return is_array and x.shape == expected.shape and expected.size > 0


def _same(a, b):
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _within(got, expected, allowed):
    return _same(got, expected) | (np.abs(got - expected) <= allowed)


def _size(x):
    return np.abs(x[np.isfinite(x)]).max(initial=0)


def _larger(prediction, value):
    """How much larger a predicted array is than the reference's; at least 1."""
    size = _size(value)
    return max(1.0, _size(prediction) / size) if size else 1.0


def _worth_a_look(got, prediction, value, allowed):
    """Whether a prediction might be right."""
    error = np.where(_same(got, prediction), 0, np.abs(got - prediction))
    return bool(error.max() <= LOOSE * _larger(prediction, value) * _size(allowed))


def _holds(judged, prediction, allowed):
    """Whether all that came back is as predicted; `allowed(name)` is the bound of the prediction."""
    names = [name for name in judged.got if prediction.get(name) is not judged.case.values[name]]
    if any(judged.outside[name].any() for name in judged.got if name not in names):
        return False
    rows = [(n, judged.got[n], prediction[n], judged.case.values[n], judged.allowed[n]) for n in names]
    if not all(_worth_a_look(*row[1:]) for row in rows):
        return False
    return all(_within(got, p, allowed(name)).all() for name, got, p, *_ in rows)


def _told_apart(judged, prediction):
    """Whether the prediction is outside the bounds of the reference, in something that came back."""
    return any(not _within(prediction[n], judged.case.values[n], judged.allowed[n]).all() for n in judged.got)


def _distances(judged, prediction):
    """How far what is wrong is from the reference, and from the prediction, in units of the bounds."""
    total = np.zeros(2)
    for name, wrong in judged.outside.items():
        got, unit = judged.got[name][wrong], _size(judged.allowed[name]) or 1.0
        for n, values in enumerate((judged.case.values, prediction)):
            x = values[name][wrong]
            total[n] += np.where(_same(got, x), 0, np.abs(got - x)).sum() / unit
    return np.where(np.isnan(total), np.inf, total)


def _survivors(hypotheses, judged, predict):
    """The hypotheses that hold in all trials, the one that fails and is smallest first, and make a difference.

    `predict(hypothesis, judged)` is a pair: the prediction, {name: array}, and a function from a name to its bound; or
    None, where the hypothesis says that the reference is right.
    """
    left = {n: (h, False, np.zeros(2)) for n, h in enumerate(hypotheses)}
    for trial in judged:
        for n, (h, apart, distances) in list(left.items()):
            predicted = predict(h, trial)
            if predicted is None:
                if trial.fails:
                    del left[n]
                continue
            values, allowed = predicted
            if not _holds(trial, values, allowed):
                del left[n]
                continue
            left[n] = h, apart or _told_apart(trial, values), distances + _distances(trial, values)
    return [h for h, apart, (before, after) in left.values() if apart and after <= before / 2]


# --- dot-product attention ------------------------------------------------------------------------------------

FORWARD, BACKWARD = ", in the forward pass only", ", in the backward pass only"
PASSES = {  # which pass has the mistake
    "both": "",
    "both, chained": "",  # gradients are of what was given, not of what was made of it: as autograd has them
    "forward": FORWARD,
    "forward, saved": FORWARD,  # backward reads the lse and the output of the other pass
    "backward": BACKWARD,
    "backward, saved": BACKWARD,
}


class Hypothesis(NamedTuple):
    mistake: Mistake
    parameter: tuple = ()  # empty, or of one
    passes: str = "both"
    second: Any = None  # another Hypothesis, of what the first one made

    @property
    def name(self):
        return self.mistake.name if self.second is None else f"{self.mistake.name} and {self.second.name}"


class Prediction(NamedTuple):
    values: dict
    call: Any = None  # the one to which this is what the reference answers, if there is one


def _attention(judged, arithmetic, known):
    passes = ["both"] if judged[0].case.dout is None else list(PASSES)
    hypotheses = [
        Hypothesis(m, parameter, p)
        for m in MISTAKES
        for p in passes
        for parameter in ([(x,) for x in m.parameters] or [()])
    ]
    hypotheses += map(Hypothesis, CONVENTIONS)
    return _named(_survivors(hypotheses, judged, _predictor(arithmetic, known)))


def _predictor(arithmetic, known):
    """`known` remembers what a changed call gives, for all passes."""

    def predict(h, trial):
        prediction = _predicted(h, trial, known)
        return None if prediction is None else (prediction.values, _bounds_of(prediction, trial, arithmetic))

    return predict


def _named(hypotheses):
    """Explanations: one for a name, of all its parameters; of its passes the first."""
    groups = {}
    for h in hypotheses:
        groups.setdefault(h.name, []).append(h)
    return [Explanation(name, _words(group)) for name, group in groups.items()]


def _words(group):
    first = group[0]
    of = {_spelled(h.parameter[0]): None for h in group if h.parameter and h.passes == first.passes}
    words = first.mistake.words.format(_listed(list(of) or [""])) + PASSES[first.passes]
    return words if first.second is None else f"{words}; and {_words([first.second])}"


def _spelled(parameter):
    x = parameter[0] if isinstance(parameter, tuple) else parameter
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def _conventions():
    """Mistake rows: to answer as a framework does, those that do the same together."""
    groups = {}
    for name, preset in PRESETS.items():
        groups.setdefault(exact(preset._replace(measured="")), []).append(name)
    for convention, names in groups.items():
        yield Mistake(names[0], f"answers as {_listed(names)} does", _with_preset(convention))


def _with_preset(convention):
    def change(call):
        ours = exact(call.options.get("convention"))._replace(measured="")
        return None if ours == convention else mistakes.with_options(call, convention=convention)

    return change


def _listed(words):
    return ", ".join(words[:-1]) + (" or " if len(words) > 1 else "") + words[-1]


CONVENTIONS = tuple(_conventions())


# --- what a mistake predicts


def _predicted(h, trial, known):
    """A Prediction, or None where the mistake makes no difference."""
    case, key = trial.case, (h.mistake.name, h.parameter, id(trial.case.values))
    if h.second is not None:
        return _predicted_twice(h, trial)
    if key not in known:
        known[key] = _made(h.mistake, h.parameter, case)
    made = known[key]
    if made is None:
        return None
    call, values, answered, raw = made
    if h.passes == "both":
        return Prediction(values, None if answered else call)
    if h.passes == "both, chained":
        return _chained(h, case, call, raw)
    return _in_one_pass(h, case, call, values)


def _made(mistake, parameter, case):
    """(call, arrays, whether they are more than the reference answers to the call, what it answers), or None."""
    call = case.call if mistake.change is None else _attempt(mistake.change, case.call, *parameter)
    if call is None:
        return None
    values = case.values if call is case.call else reference(call, case.dout)
    changed = None
    if mistake.answer is not None:
        changed = _attempt(mistake.answer, Case(call, case.dout, values), *parameter)
        if changed is None:
            return None
    return call, _fitted(case, values | (changed or {})), bool(changed), values


def _attempt(function, *args):
    """Some changes make no sense for some calls: the reference refuses them."""
    try:
        return function(*args)
    except ValueError:
        return None


def _fitted(case, values):
    """The arrays of another call, as far as this one has them."""
    found = {}
    for name, value in case.values.items():
        x = values.get(name)
        if x is None:  # an argument that is not there any more
            x = np.zeros_like(value)
        if x.shape != value.shape and name in ("dk", "dv"):  # of each query head
            x = mistakes.from_heads(x, value.shape[1], mistakes.rules_of(case.call).convention.gqa_order)
        found[name] = mistakes.shrink(x, value.shape) if x.shape != value.shape else x
    return found


def _chained(h, case, call, values):
    """The gradients go back to where a changed array was read from."""
    given, changed = mistakes.arguments(case.call), mistakes.arguments(call)
    if case.dout is None or all(x is y for x, y in zip(given, changed)):
        return None
    sources = _sources(h, case.call)
    if sources is None:
        return None
    ends = np.cumsum([0, *(0 if x is None else x.size for x in given)])
    total = np.zeros(ends[-1] + 1)
    for name, source in zip(GRADIENTS, sources):
        if source is not None:
            places, factors = source
            np.add.at(total, places, factors * values[name])
    pieces = [None if x is None else total[a + 1 : b + 1].reshape(x.shape) for x, a, b in zip(given, ends, ends[1:])]
    grads = {name: x for name, x in zip(GRADIENTS, pieces) if x is not None}
    return Prediction(_fitted(case, values | grads))


def _sources(h, call):
    """For each changed array: the number of the element that it was read from, 0 for none, and times what.

    Found by changing arrays of zeros, of ones, and of the numbers of their elements; None where it is no such copy.
    """
    given = mistakes.arguments(call)
    starts = np.cumsum([1, *(0 if x is None else x.size for x in given)])

    def changed(make):
        arrays = tuple(None if x is None else make(x, start) for x, start in zip(given, starts))
        return mistakes.arguments(h.mistake.change(call._replace(args=arrays), *h.parameter))

    rows = zip(
        changed(lambda x, start: np.zeros(x.shape)),
        changed(lambda x, start: np.ones(x.shape)),
        changed(lambda x, start: start + np.arange(x.size, dtype=np.float64).reshape(x.shape)),
    )
    found = []
    for constant, one, number in rows:
        if constant is None:
            found.append(None)
            continue
        factor = one - constant
        place = np.where(factor == 0, 0, (number - constant) / np.where(factor == 0, 1, factor))
        if not np.allclose(place, np.rint(place), rtol=0, atol=1e-6) or (place > starts[-1]).any():
            return None
        found.append((np.rint(place).astype(int), factor))
    return found


def _in_one_pass(h, case, call, values):
    """The mistake is in forward or in backward alone, which starts from what forward saved, or for itself."""
    forward = {name: values[name] for name in ("out", "lse")}
    if case.dout is None or (h.mistake.change is None and h.passes != "forward, saved"):
        return None
    if h.passes.startswith("forward"):
        if all(forward[name] is case.values[name] for name in forward):
            return None
        grads = case.values
        if h.passes == "forward, saved":
            grads = pulled_back(case.call, case.dout, forward["out"], forward["lse"])
        return Prediction(_fitted(case, grads | forward))
    right = {name: case.values[name] for name in ("out", "lse")}
    if h.passes == "backward":
        return Prediction(values | right)
    grads = pulled_back(call, case.dout, *right.values()) | right
    if h.mistake.answer is not None:
        grads |= _attempt(h.mistake.answer, Case(call, case.dout, grads), *h.parameter) or {}
    return Prediction(_fitted(case, grads | right))


def _bounds_of(prediction, trial, arithmetic):
    """A function from a name to the bound of what is predicted there."""
    found = {}

    def allowed(name):
        value, p = trial.case.values[name], prediction.values[name]
        if prediction.call is not None:
            if not found:
                found.update(attention_bounds(prediction.call, trial.case.dout, arithmetic, trial.tiers))
            if name in found and found[name].least.shape == value.shape:
                return found[name].least
        return _size(trial.allowed[name]) * _larger(p, value)

    return allowed


# --- two mistakes at once


def _pairs(judged, arithmetic, known):
    """Of mistakes that make a difference in trials that fail, each pair once, a changed call first."""
    failing = [trial for trial in judged if trial.fails and _scores(trial.case.call) <= SMALL][:LOOKED_AT]
    if not failing:
        return []
    singles = list(dict.fromkeys(h for trial in failing for h in _different(trial, known)))
    singles = [h for h in singles if all(_small_enough(h, trial, known) for trial in failing)]
    changes = [h for h in singles if h.mistake.change is not None]
    answers = [h for h in singles if h.mistake.change is None]
    first = [h for h in changes if h.mistake.answer is None]
    pairs = []
    if any(trial.outside[name].any() for trial in failing for name in ("out", "lse") if name in trial.outside):
        pairs += [(h, other) for n, h in enumerate(changes) for other in changes[n + 1 :] if h in first]
        pairs += [(h, other) for h in first for other in answers]
    pairs += [(h, other) for n, h in enumerate(answers) for other in answers[n + 1 :]]
    pairs = [(h, other) for h, other in pairs if h.mistake is not other.mistake]
    for trial in failing:
        alone = {h: _seen_alone(h, trial, known) for h in singles}
        pairs = [(h, other) for h, other in pairs if _complete(h, other, alone, set(trial.got))]
    pairs = [h._replace(second=other) for h, other in pairs]
    for trial in failing:
        pairs = [h for h in pairs if _worth_both_looks(h, trial)]
    return _named(_survivors(pairs[:PAIRS], judged, _predictor(arithmetic, known)))


def _scores(call):
    return math.prod(call.args[0].shape[:3]) * call.args[1].shape[2]


def _small_enough(h, trial, known):
    """Whether a mistake changes the output and the lse no more than they are wrong, but for what a second may undo."""
    prediction = _predicted(h, trial, known)
    if prediction is None:
        return True
    for name in {"out", "lse"} & set(trial.got):
        value, allowed = trial.case.values[name], trial.allowed[name]
        changed, wrong = (_size(x - value) for x in (prediction.values[name], trial.got[name]))
        if not changed <= UNDONE * wrong + _size(allowed):
            return False
    return True


def _seen_alone(h, trial, known):
    """Names of the arrays in which a mistake alone differs from the reference, and of those where it might be right."""
    prediction = _predicted(h, trial, known)
    values = trial.case.values if prediction is None else prediction.values
    differs, right = set(), set()
    for name, got in trial.got.items():
        value, allowed = trial.case.values[name], trial.allowed[name]
        if not _within(values[name], value, allowed).all():
            differs.add(name)
        if _worth_a_look(got, values[name], value, allowed):
            right.add(name)
    return differs, right


def _complete(h, other, alone, names):
    """Whether what only one of them changes might be right; a changed call may change whatever the other does."""
    (differs, right), (differs_too, right_too) = alone[h], alone[other]
    if other.mistake.change is None and not names - differs_too <= right:
        return False
    return h.mistake.change is not None or names - differs <= right_too


def _different(trial, known):
    """Hypotheses of both passes that can be told apart in a trial from the reference, and from one another."""
    seen = set()
    for mistake in MISTAKES:
        for parameter in [(x,) for x in mistake.parameters] or [()]:
            h = Hypothesis(mistake, parameter)
            prediction = _predicted(h, trial, known)
            if prediction is None or not _told_apart(trial, prediction.values):
                continue
            key = b"".join(np.round(prediction.values[name], 12).tobytes() for name in trial.got)
            if key not in seen:
                seen.add(key)
                yield h


def _worth_both_looks(h, trial):
    """Whether the output and the lse of a pair might be right."""
    call, both = trial.case.call, ((h.mistake, h.parameter), (h.second.mistake, h.second.parameter))
    for mistake, parameter in both:
        if mistake.change is not None:
            call = _attempt(mistake.change, call, *parameter) or call
    values = trial.case.values if call is trial.case.call else reference(call)
    for mistake, parameter in both:
        if mistake.answer is not None:
            values = values | (_attempt(mistake.answer, Case(call, None, values), *parameter) or {})
    for name in {"out", "lse"} & set(trial.got):
        got, value, allowed = trial.got[name], trial.case.values[name], trial.allowed[name]
        least = _size(allowed) * _larger(values[name], value)
        nearer = _size(got - values[name]) <= max(_size(got - value), least)
        if not nearer or not _worth_a_look(got, values[name], value, allowed):
            return False
    return True


def _predicted_twice(h, trial):
    """The second mistake, of the call and the arrays that the first one leaves; or one of them alone."""
    case = trial.case
    unchanged = case.call, case.values, False, case.values
    first = _made(h.mistake, h.parameter, case)
    call, values, answered, _ = first or unchanged
    again = _made(h.second.mistake, h.second.parameter, Case(call, case.dout, values))
    if first is None and again is None:
        return None
    last, values, more, _ = again or (call, values, False, values)
    return Prediction(_fitted(case, values), None if answered or more else last)


# --- any mechanism: its options, and simple changes of its arrays ----------------------------------------------


def _options(mechanism, judged, arithmetic):
    """Each option at another of the values that the mechanism's own example draws."""
    hypotheses = [(name, value) for name, values in _drawn(mechanism).items() for value in values]

    def predict(h, trial):
        name, value = h
        call = trial.case.call
        asked = call.options.get(name)
        if not _plain(asked) or asked == value:
            return None
        other = call._replace(options=call.options | {name: value})
        found = _attempt(_everything, mechanism, other, trial.case.dout)
        values, expected = (trial.case.values, None) if found is None else found
        if any(values.get(n, np.empty(0)).shape != x.shape for n, x in trial.got.items()):
            values = trial.case.values  # no such call, or no such arrays: the reference itself, which is wrong
        bounds = {}

        def allowed(name):
            if not bounds:
                trees = noise_bounds_of_call(mechanism, other, trial.case.dout, expected, arithmetic)
                bounds.update(_flat(*trees, mechanism))
            return bounds[name].least

        return values, allowed

    return [
        Explanation(f"{name}={value!r}", f"answers as with {name}={value!r}, whatever is asked for")
        for name, value in _survivors(hypotheses, judged, predict)
    ]


def _drawn(mechanism):
    """{option: its plain values, the most frequent first}."""
    seen = {}
    for seed in range(DRAWS if hasattr(mechanism, "example") else 0):
        for name, value in mechanism.example(RandomDraw(seed)).options.items():
            if _plain(value):
                counts = seen.setdefault(name, {})
                counts[value] = counts.get(value, 0) + 1
    return {name: sorted(counts, key=counts.get, reverse=True) for name, counts in seen.items() if len(counts) > 1}


def _plain(value):
    if isinstance(value, tuple):
        return not hasattr(value, "_fields") and all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _everything(mechanism, call, dout):
    """({name: array}, (out, gradients)) of a call."""
    out, saved = mechanism.forward(*call.args, **call.options)
    grads = None if dout is None else tuple(mechanism.backward(dout, saved))
    return dict(_flat(out, grads, mechanism)), (out, grads)


def _flat(out, grads, mechanism):
    """Yield (name, leaf) as a Trial names them; a Bound is a leaf."""
    yield from _leaves(out, "" if _is_tree(out) else "out")
    for name, grad in zip(contract.parameter_names(mechanism), grads or ()):
        yield from _leaves(grad, f"d{name}")


def _is_tree(x):
    return isinstance(x, tuple) and getattr(x, "_fields", None) != Bound._fields


def _leaves(tree, path):
    if _is_tree(tree):
        for i, name in enumerate(getattr(tree, "_fields", range(len(tree)))):
            yield from _leaves(tree[i], f"{path}.{name}" if path else str(name))
    elif tree is not None:
        yield path, tree


# --- simple changes of what came back


def _arrays(mechanism, judged):
    """One Explanation, if every array that is wrong is a simple change of what it should be."""
    wrong = dict.fromkeys(name for j in judged for name, x in j.outside.items() if x.any())
    stories = {}
    for name in wrong:
        for words, change in _changes(mechanism, judged, name):
            if _explains(name, change, judged):
                stories.setdefault(words, []).append(name)
                break
        else:
            return []
    words = "; ".join(f"{', '.join(names)} {w[0] if len(names) == 1 else w[1]}" for w, names in stories.items())
    code = " and ".join(f"{', '.join(names)} {w[2]}" for w, names in stories.items())
    return [Explanation(code, words)]


def _explains(name, change, judged):
    """Whether one array is changed so in all trials."""

    def predict(change, trial):
        prediction, base = change(trial)
        value = trial.case.values[name]
        if prediction is None or prediction.shape != value.shape:
            return {name: value}, None
        return {name: prediction}, lambda _: _size(base) * _larger(prediction, value)

    alone = [j._replace(got={name: j.got[name]}, outside={name: j.outside[name]}) for j in judged if name in j.got]
    return bool(_survivors([change], alone, predict))


def _changes(mechanism, judged, name):
    """Yield ((words for one array, for several, a short name), a function from a trial to the other array)."""
    judged = [j for j in judged if name in j.case.values]  # an optional parameter is not in all

    def times(factor):
        def change(trial):
            return trial.case.values[name] * factor(trial), trial.allowed[name]

        return change

    for words, code, c in (("zero", "zero", 0), ("the negative of what", "negated", -1), ("twice what", "doubled", 2),
                           ("half of what", "halved", 0.5)):  # fmt: skip
        due = "" if c == 0 else " it should be"
        yield (f"is {words}{due}", f"are {words}{due.replace('it', 'they')}", code), times(lambda t, c=c: c)
    for axis in range(max(x.ndim for x in judged[0].case.values.values())):
        for code, power in (("divided", -1.0), ("multiplied", 1.0)):
            words = f"{code} by the length of axis {axis} of the output" + (": averaged" if power < 0 else "")
            yield (f"is {words}", f"are {words}", "averaged" if power < 0 else "summed"), times(
                lambda t, axis=axis, power=power: _length(t, axis) ** power
            )
    words = "divided by the number of elements of the output: averaged"
    yield (f"is {words}", f"are {words}", "averaged"), times(lambda t: 1 / _first(t).size)
    for other in judged[0].case.values:
        if other != name:
            yield (f"is what {other} should be", f"are what {other} should be", f"is {other}"), _exchanged(name, other)
    for what, move in _MOVES.items():
        for axis in range(judged[0].case.values[name].ndim):
            words = what.format(axis)
            yield (f"is {words}", f"are {words}", words), _moved(name, move, axis)
    if name.startswith("d") and judged[0].case.dout is not None:
        for which, place in (("first", 0), ("last", -1)):
            words = f"that of the {which} item alone, not summed"
            yield (f"is {words}", f"are {words}", f"of the {which} item"), _of_item(mechanism, name, place)
    c = _fitted_factor(judged[0], name)
    words = f"{c:.6g} times what"
    yield (f"is {words} it should be", f"are {words} they should be", "scaled"), times(lambda t: c)


def _first(trial):
    return next(iter(trial.case.values.values()))


def _length(trial, axis):
    shape = _first(trial).shape
    return float(max(1, shape[axis])) if axis < len(shape) else 1.0


def _fitted_factor(trial, name):
    got, value = trial.got.get(name), trial.case.values[name]
    if got is None:
        return 1.0
    usable = np.isfinite(got) & np.isfinite(value)
    square = np.sum(value[usable] ** 2)
    return float(np.sum(got[usable] * value[usable]) / square) if square else 1.0


def _exchanged(name, other):
    def change(trial):
        return trial.case.values.get(other), trial.allowed.get(other, trial.allowed[name])

    return change


def _moved(name, move, axis):
    def change(trial):
        values, allowed = trial.case.values[name], trial.allowed[name]
        if axis >= values.ndim:  # calls of one mechanism need not have arrays of one rank
            return values, allowed
        return move(values, axis), move(allowed, axis)

    return change


_MOVES = {
    "transposed: axes {} and the next are swapped": lambda x, axis: x.swapaxes(axis, min(axis + 1, x.ndim - 1)),
    "reversed along axis {}": np.flip,
    "shifted by one along axis {}": lambda x, axis: np.roll(x, 1, axis),
    "shifted back by one along axis {}": lambda x, axis: np.roll(x, -1, axis),
}


def _of_item(mechanism, name, place):
    """The gradient that one item of the batch gives."""

    def change(trial):
        case = trial.case

        def only(x):
            kept = np.zeros_like(x)
            kept[place] = x[place]
            return kept

        dout = tree_map(only, case.dout)
        grads = reference(case.call, dout) if trial.tiers else _everything(mechanism, case.call, dout)[0]
        return grads.get(name), trial.allowed[name]

    return change
