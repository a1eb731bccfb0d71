"""What the interactive page computes: one call of a mechanism, forward and backward. Runs in Pyodide and CPython."""

import inspect
import json
import math
from typing import NamedTuple, get_args, get_origin

import numpy as np

from refattn import registry
from refattn.core import Shaped, leaves, tree_map
from refattn.oracle.derivatives import complex_step, inner


class Option(NamedTuple):
    """A keyword of forward that the reader may change; what is drawn for it follows from the kind of `start`."""

    name: str
    words: str
    start: bool | float | np.ndarray  # a switch, a slider, a grid of ticks
    range: tuple = ()  # of a slider: lowest, highest, step


class Row(NamedTuple):
    """A mechanism of the page. Adding one is adding a row."""

    name: str  # of the file
    words: str
    args: tuple  # as of forward; a Params is a dict here, made a Params when the file is imported
    options: tuple = ()


ROWS = (
    Row(
        "scaled_dot_product",
        "Scaled dot-product attention",
        (
            np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]]]),
            np.array([[[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [1.0, 1.0]]]),
            np.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.5, -1.0]]]),
        ),
        (
            Option("is_causal", "a query sees no later key", True),
            Option("scale", "multiplies the scores", 0.7, (0, 4, 0.1)),
            Option("mask", "which key takes part for which query", np.ones((1, 4, 4), bool)),
        ),
    ),
    Row(
        "gumbel_softmax",
        "Softmax with a temperature",
        (np.array([[2.0, 1.0, 0.0, -1.0], [0.5, 0.5, 3.0, 0.0]]),),
        (
            Option("temperature", "divides the scores", 1.0, (0.1, 5, 0.1)),
            Option("mask", "which entry takes part", np.ones((2, 4), bool)),
        ),
    ),
    Row(
        "squeeze_excitation",
        "Squeeze-and-Excitation",
        (
            np.array([[[[1.0, 0.5], [0.2, -0.5]], [[0.5, 0.8], [1.0, 0.2]], [[-1.0, 0.2], [0.5, 1.5]]]]),
            {
                "w1": np.array([[0.5, -0.2, 0.3], [-0.5, 0.8, 0.4]]),
                "w2": np.array([[1.0, 0.5], [-1.0, 1.0], [0.5, -2.0]]),
                "b1": np.array([0.5, 0.0]),
                "b2": np.array([0.0, 0.5, 0.0]),
            },
        ),
    ),
)


def menu():
    """JSON: what the reader may choose from."""
    return json.dumps([[row.name, row.words] for row in ROWS])


@np.errstate(all="ignore")  # a NaN is shown where it is
def respond(text):
    """JSON to JSON: {"name", "arrays", "options", "cotangent"} to all that is shown; what is absent starts anew."""
    asked = json.loads(text)
    row = next(row for row in ROWS if row.name == asked["name"])
    mechanism = registry.find(row.name)
    start = tuple(mechanism.Params(**a) if isinstance(a, dict) else a for a in row.args)
    given = iter(asked.get("arrays") or [a for _, a in leaves(start)])
    args = tree_map(lambda a: _like(a, next(given)), start)
    given = asked.get("options") or {}
    options = {o.name: _like(o.start, given.get(o.name, o.start)) for o in row.options}

    out, saved = mechanism.forward(*args, **options)
    last = np.arange(out.size) == out.size - 1  # the gradient of the last entry
    dout = _like(out, asked.get("cotangent") or last)
    grads = mechanism.backward(dout, saved)

    rng = np.random.default_rng(0)
    along = tree_map(lambda a: rng.normal(size=a.shape), args)
    (jv,) = complex_step(lambda *moved: mechanism.forward(*moved, **options)[:1], args, along)

    hints, weights = mechanism.forward.hints, mechanism.ABOUT.weights
    names = list(inspect.signature(mechanism.forward).parameters)[: len(args)]
    dname = next(iter(inspect.signature(mechanism.backward).parameters))
    answer = {
        "page": f"{'primitives' if mechanism.family == 'primitives' else 'mechanisms'}/{row.name}",
        "args": [_grid(*one) for one in _named(names, args, hints)],
        "options": [_option(o, options[o.name], hints[o.name]) for o in row.options],
        "out": _grid(dname[1:], out, mechanism.backward.hints[dname]),
        "weights": _grid(weights, getattr(saved, weights), mechanism.Saved.__annotations__[weights]),
        "cotangent": _grid(dname, dout, mechanism.backward.hints[dname]),
        "grads": [_grid("d" + name, *rest) for name, *rest in _named(names, grads, hints)],
        "check": [_number(inner(dout, jv)), _number(inner(grads, along))],
        "code": _code(row.name, names, args, options, dname, dout),
    }
    return json.dumps(answer, allow_nan=False)


def _like(start, value):
    """What came as JSON, as the kind of thing that the row has there."""
    if isinstance(start, np.ndarray):
        return np.array(value, start.dtype).reshape(start.shape)
    return type(start)(value)


def _named(names, tree, hints):
    """(name, array, its hint) of every array: ("params.w1", ...)."""
    for name, branch in zip(names, tree, strict=True):
        for path, array in leaves(branch):
            yield (f"{name}.{path}", array, hints[name].__annotations__[path]) if path else (name, array, hints[name])


def _grid(name, array, hint):
    numbers = [_number(x) for x in array.ravel().tolist()]
    return {"name": name, "axes": _axes(hint, array.ndim), "shape": list(array.shape), "numbers": numbers}


def _number(x):
    return x if math.isfinite(x) else repr(x)  # JSON has neither NaN nor infinity


def _axes(hint, ndim):
    """The letters of Shaped[Array, "B *H Q D"], if there is one for every axis; a star may stand for none."""
    shaped = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Shaped), None)
    letters = [] if shaped is None else [a for a in get_args(shaped)[1].split() if a[0] != "*"]
    return letters if len(letters) == ndim else []


def _option(option, value, hint):
    kind = {bool: "switch", float: "slider", np.ndarray: "ticks"}[type(option.start)]
    shown = _grid(option.name, value, hint) if kind == "ticks" else value
    return {"name": option.name, "words": option.words, "kind": kind, "value": shown, "range": option.range}


def _code(name, names, args, options, dname, dout):
    """The same call as a program, which prints the same numbers."""
    lines = ["import numpy as np", f"from refattn import {name}", ""]
    for argument, value in zip(names, args, strict=True):
        if isinstance(value, tuple):
            fields = [f"    {field}={_literal(array)}," for field, array in value._asdict().items()]
            lines += [f"{argument} = {name}.Params(", *fields, ")"]
        else:
            lines.append(f"{argument} = {_literal(value)}")
    given = {o: value for o, value in options.items() if not (isinstance(value, np.ndarray) and value.all())}
    given = ", ".join(names + [f"{option}={_literal(value)}" for option, value in given.items()])
    grads = ", ".join("d" + argument for argument in names)
    return "\n".join(
        [
            *lines,
            f"{dname[1:]}, saved = {name}.forward({given})",
            f"{dname} = {_literal(dout)}",
            f"{grads if len(names) > 1 else f'({grads},)'} = {name}.backward({dname}, saved)",
        ]
    )


def _literal(value):
    return f"np.array({value.tolist()})" if isinstance(value, np.ndarray) else repr(value)
