"""Shapes and dtypes: said once, in the signature of a function; checked on every call, before any work."""

import functools
import inspect
from types import UnionType
from typing import Annotated as Shaped  # Shaped[Array, "N C H W"]
from typing import get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

Array = np.ndarray  # real or complex floating point, all of one precision in one call
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer]
KINDS = {Array: ("fc", "floating point"), Bools: ("b", "bool"), Ints: ("iu", "integers")}

# --- errors: `where: what has which value, expected what` ---------------------------------------------------


class ShapeError(ValueError):
    """Two arrays disagree about the length of an axis they share."""


class DtypeError(TypeError):
    """An argument is no array, or an array of numbers that the function cannot compute with."""


def expect(holds, what, value, expected):
    """Raise the one error that bad options get: `expect(stride > 0, "conv.forward: stride", stride, "at least 1")`."""
    if not holds:
        raise ValueError(f"{what} is {value!r}, expected {expected}")


# --- the check ----------------------------------------------------------------------------------------------


def shaped(function):
    """Check arguments and result against the function's own Shaped[Array, "N C ..."] hints, before any work.

    A letter names a length and means the same length throughout one call; a number means itself; "B?" is as
    long as B or 1; "*S" (or "...") stands for any number of axes. The letters of another file's Params or Saved
    are its own, unless tied to ours: Shaped[linear.Params, "I=C O=R"].
    """
    hints = get_type_hints(function, include_extras=True)
    result_hint = hints.pop("return", None)
    signature = inspect.signature(function)
    where = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

    def check(args, kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{where}: {error}, expected {where}{_plain(signature)}") from None
        call = _Unifier(where, function.__module__)
        for name, value in bound.arguments.items():
            call.unify(name, value, hints.get(name))
        return call, bound

    @functools.wraps(function)
    def checked(*args, **kwargs):
        call, _ = check(args, kwargs)
        result = function(*args, **kwargs)
        call.unify("result", result, result_hint)
        return result

    def arguments(*args, **kwargs):
        """What the function would be called with, checked, defaults included: {name: value}. It is not called."""
        _, bound = check(args, kwargs)
        bound.apply_defaults()
        return bound.arguments

    checked.arguments = arguments
    checked.hints = hints
    checked.result_hint = result_hint
    return checked


def spelled(thing):
    """A @shaped function or a NamedTuple of arrays in words: "forward(x: (N, C), *, eps=1e-05) -> (N, C)"."""
    if hasattr(thing, "_fields"):
        hints = get_type_hints(thing, include_extras=True)
        return f"{thing.__name__}({', '.join(f'{name}: {_spell_hint(hints[name])}' for name in thing._fields)})"
    parts, starred = [], False
    for p in inspect.signature(thing).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        hint = f": {_spell_hint(thing.hints[p.name])}" if _carries_shape(thing.hints.get(p.name)) else ""
        default = "" if p.default is p.empty else f" = {p.default!r}" if hint else f"={p.default!r}"
        parts.append(p.name + hint + default)
    return f"{thing.__name__}({', '.join(parts)}) -> {_spell_hint(thing.result_hint)}"


def _spell_hint(hint):
    if get_origin(hint) is tuple:
        return f"({', '.join('...' if h is ... else _spell_hint(h) for h in get_args(hint))})"
    if get_origin(hint) is Shaped:
        kind, axes = get_args(hint)
        note = {Array: "", Bools: " bool", Ints: " int"}.get(kind)
        return f"{_owner(kind)} with {axes}" if note is None else _spell(axes.split()) + note
    if get_origin(hint) is not None or isinstance(hint, UnionType):
        return " or ".join("None" if h is type(None) else _spell_hint(h) for h in get_args(hint))
    return _owner(hint) if hasattr(hint, "_fields") else getattr(hint, "__name__", str(hint))


def _owner(kind):
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def _plain(signature):
    empty = inspect.Parameter.empty
    return signature.replace(
        parameters=[p.replace(annotation=empty) for p in signature.parameters.values()], return_annotation=empty
    )


class _Unifier:
    """What is known of letters and precision, in the course of one call."""

    def __init__(self, where, module):
        self.where, self.module = where, module
        self.lengths = {}  # (scope, letter) -> (length, the argument that fixed it)
        self.precision = None  # (dtype, the argument that fixed it)

    def unify(self, name, value, hint, rename=None):
        form, content, axes, others = _plan(hint, hasattr(value, "_fields"), getattr(value, "ndim", None))
        if form is None or isinstance(value, others):
            return
        if form == "array":
            self._array(name, value, content, axes, rename or (lambda letter: letter))
        elif form == "tied":  # Shaped[other.Params, "I=C"]
            outer = rename or (lambda letter: letter)
            self._fields(name, value, content, lambda letter: outer(axes[letter]) if letter in axes else (name, letter))
        elif form == "fields":
            foreign = content.__module__ != self.module
            self._fields(name, value, content, (lambda letter: (name, letter)) if foreign else rename)
        else:
            many = "any number" if content[-1] is ... else len(content)
            if not isinstance(value, tuple) or many not in ("any number", len(value)):
                raise DtypeError(f"{self.where}: {name} is {_kind(value)}, expected a tuple of {many}")
            for i, item in enumerate(value):
                self.unify(f"{name}[{i}]", item, content[0] if content[-1] is ... else content[i], rename)

    def _fields(self, name, value, hint, rename):
        if getattr(value, "_fields", None) != hint._fields:
            wanted = f"{_owner(hint)}({', '.join(hint._fields)})"
            raise DtypeError(f"{self.where}: {name} is {_kind(value)}, expected {wanted}")
        if hint.__name__ == "Saved" and hint.__module__ != self.module:
            return  # made by that file's forward, which checked it, and read by its backward, which checks it
        for field, inner in _hints_of(hint).items():
            self.unify(f"{name}.{field}", getattr(value, field), inner, rename)

    def _array(self, name, value, kind, axes, rename):
        letters, description = KINDS[kind]
        if not isinstance(value, (np.ndarray, np.generic)) or isinstance(value, (np.ma.MaskedArray, np.matrix)):
            wanted = f"an array of {description} of shape {_spell(axes)}"
            raise DtypeError(f"{self.where}: {name} is {_kind(value)}, expected {wanted}")
        if value.dtype.kind not in letters:
            raise DtypeError(f"{self.where}: {name} has dtype {value.dtype}, expected {description}")
        if kind is Array:
            precision = _precision(value.dtype)
            first, by = self.precision = self.precision or (precision, name)
            if first != precision:
                story = f"{self.where}: {name} has dtype {value.dtype}"
                raise DtypeError(f"{story}, expected the precision of {by}, {first}")
        self._axes(name, value.shape, axes, rename)

    def _axes(self, name, shape, axes, rename):
        stars = _stars(axes)
        spread = len(shape) - len(axes) + 1 if stars else 1
        if stars and spread >= 0:  # gather the axes under the star into one entry
            i = stars[0]
            shape = (*shape[:i], shape[i : i + spread], *shape[i + spread :])
        fits = len(shape) == len(axes)
        for axis, length in zip(axes, shape, strict=False) if fits else ():
            if axis.endswith("?"):  # stretched, or as long as what is known by now
                fits &= length in (1, self.lengths[rename(axis[:-1])][0])
                continue
            known = int(axis) if axis.isdigit() else self.lengths.setdefault(rename(axis), (length, name))[0]
            fits &= known == length
        if not fits:
            flat = sum((a if isinstance(a, tuple) else (a,) for a in shape), ())
            letters = [a.rstrip("?") for a in axes]
            facts = {a: self.lengths[rename(a)] for a in letters if not a.isdigit() and rename(a) in self.lengths}
            facts = [f"{a.lstrip('*')} = {length} from {by}" for a, (length, by) in facts.items() if by != name]
            story = f"{self.where}: {name} has shape {flat}, expected {_spell(axes)}"
            raise ShapeError("; ".join([story, *([", ".join(facts)] if facts else [])]))


@functools.cache
def _stars(axes):
    return [i for i, axis in enumerate(axes) if axis[0] in "*."]


@functools.cache
def _precision(dtype):
    return np.finfo(dtype).dtype  # complex128 is float64 twice: the two may meet


@functools.cache
def _hints_of(named_tuple):
    return get_type_hints(named_tuple, include_extras=True)


@functools.cache
def _plan(hint, named, ndim):
    """(form, content, axes, other types that may stand in its place) of a hint; form is None if it speaks of no shapes.

    Of alternatives it is the NamedTuple for a value that is one (`named`), else the array that has `ndim` axes.
    """
    alternatives = get_args(hint) if get_origin(hint) not in (tuple, Shaped) else ()
    others = tuple(h for h in alternatives if isinstance(h, type) and not _carries_shape(h))
    spoken = [h for h in alternatives or (hint,) if _carries_shape(h)]
    if not spoken:
        return None, None, None, others
    same_kind = [h for h in spoken if hasattr(h, "_fields") == named] or spoken
    hint = next((h for h in same_kind if _counts(h, ndim)), same_kind[0])
    if get_origin(hint) is tuple:
        return "tuple", get_args(hint), None, others
    if get_origin(hint) is not Shaped:
        return "fields", hint, None, others
    content, axes = get_args(hint)
    if content in KINDS:
        return "array", content, tuple(axes.split()), others
    return "tied", content, dict(tie.split("=") for tie in axes.split()), others


def _counts(hint, ndim):
    """Whether a hint of an array has `ndim` axes, or any number."""
    axes = get_args(hint)[1].split() if get_origin(hint) is Shaped else ()
    return len(axes) == ndim or bool(_stars(tuple(axes)))


@functools.cache
def _carries_shape(hint):
    if get_origin(hint) is Shaped or hasattr(hint, "_fields"):
        return True
    return any(_carries_shape(h) for h in get_args(hint))  # of a tuple or a union


def _spell(axes):
    return f"({', '.join(a.replace('?', ' or 1') for a in axes)}{',' if len(axes) == 1 else ''})"


def _kind(value):
    kind = type(value)
    return "None" if value is None else f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")
