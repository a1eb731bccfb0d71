"""What a candidate is, how it is called, and what it gives back.

It is called like the reference's forward, with the options that its own signature names; the others stay at their
defaults. It returns `out`, or a tuple that begins with it. It raises NotHandled for a call it makes no claim about.
Its gradients come from the framework's automatic differentiation, or from a second function, called as
backward(dout, *args, out, ..., **options), that returns one gradient per array argument; or they are not judged.
"""

import importlib
import inspect
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refattn.core import Call


class NotHandled(Exception):
    """Raised by a candidate for a call that it makes no claim about: another one is drawn."""


class Departure(NotHandled):
    """Raised by an adapter where its framework is known to differ from the reference and from what it says itself.

    `finding` is the page in docs/findings that shows the smallest case.
    """

    def __init__(self, finding, words):
        super().__init__(words)
        self.finding = finding


class Claim(NamedTuple):
    """What a candidate's signature says that it takes."""

    count: int  # array arguments, from the first
    options: frozenset


def claim(candidate, mechanism):
    """Read the candidate's signature against the reference's; a ValueError where the two do not meet."""
    arrays, options = _parameters(mechanism)
    name = getattr(candidate, "__name__", repr(candidate))
    expected = f"{', '.join(p.name for p in arrays)}" + (f" and any of {', '.join(options)}" if options else "")
    try:
        parameters = inspect.signature(candidate).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"check: {name} has no signature to read, expected a function of {expected}") from None
    count, named = 0, set()
    for p in parameters:
        place = count < len(arrays) and p.kind is not p.KEYWORD_ONLY
        if p.kind is p.VAR_POSITIONAL:
            count = len(arrays)
        elif p.kind is p.VAR_KEYWORD:
            named = set(options)
        elif p.name in options:
            named.add(p.name)
        elif place and (p.default is p.empty or p.name == arrays[count].name):
            count += 1
        elif p.default is p.empty:
            raise ValueError(f"check: {name} takes {p.name}, expected {expected}")
    missing = [p.name for p in arrays[count:] if p.default is p.empty]
    missing += [p.name for p in options.values() if p.default is p.empty and p.name not in named]
    if missing:
        raise ValueError(f"check: {name} does not take {', '.join(missing)}, expected {expected}")
    return Claim(count, frozenset(named))


def claimed(call, claim, mechanism):
    """The call without what the candidate does not take; NotHandled where the reference refuses it so."""
    kept = Call(call.args[: claim.count], {k: v for k, v in call.options.items() if k in claim.options})
    if len(kept.args) < len(call.args) or len(kept.options) < len(call.options):
        try:
            mechanism.forward(*kept.args, **kept.options)
        except (ValueError, TypeError) as error:
            raise NotHandled("no sense without what the candidate does not take") from error
    return kept


def off_by_default(mechanism):
    """The options whose default is None."""
    return {name for name, p in _parameters(mechanism)[1].items() if p.default is None}


def handed_over(candidate, call, may_be_off):
    """The options that a candidate is called with. Of those that may be off, None is left to its own default."""
    off = {name for name, x in call.options.items() if x is None and name in may_be_off}
    off -= {name for name, p in inspect.signature(candidate).parameters.items() if p.default is p.empty}
    options, convention = dict(call.options), call.options.get("convention")
    options.pop("convention", None)
    options = {name: x for name, x in options.items() if name not in off}
    if "is_causal" in call.options:  # None would be the convention's
        said = call.options["is_causal"]
        options["is_causal"] = bool(convention and convention.is_causal) if said is None else said
    return options


def exercised(call, mechanism):
    """Names of the arguments that are there, and of the options that differ from their defaults."""
    arrays, options = _parameters(mechanism)
    there = {p.name for p, x in zip(arrays, call.args) if x is not None}
    return there | {name for name, value in call.options.items() if not _same(value, options[name].default)}


def parameter_names(mechanism):
    return list(inspect.signature(mechanism.forward).parameters)


def _parameters(mechanism):
    parameters = inspect.signature(mechanism.forward).parameters.values()
    arrays = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return arrays, {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _same(value, default):
    return value is default or (np.isscalar(value) and value == default)


# --- how to run one: run(candidate, args, options, dout) gives (result, gradients); dout is None where none are due --


def runner(framework, backward):
    if framework in (None, "numpy"):
        return with_backward(backward)
    return importlib.import_module("refattn.frameworks").load(framework).run


def with_backward(backward):
    """For a candidate of NumPy arrays."""

    def run(candidate, args, options, dout):
        result = candidate(*args, **options)
        if dout is None:
            return result, None
        outputs = result if isinstance(result, (tuple, list)) and not hasattr(result, "_fields") else (result,)
        parameters = inspect.signature(backward).parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        grads = backward(dout, *args, *outputs, **{k: v for k, v in options.items() if everything or k in parameters})
        several = isinstance(grads, (tuple, list)) and (len(args) > 1 or not hasattr(grads, "_fields"))
        return result, grads if several else (grads,)

    return run


def raised(error):
    """An exception of a candidate in words, with its place."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def version(framework):
    """Of a framework, as its adapter says it; of NumPy for a candidate without one."""
    if framework in (None, "numpy"):
        return np.__version__
    return importlib.import_module("refattn.frameworks").load(framework).VERSION
