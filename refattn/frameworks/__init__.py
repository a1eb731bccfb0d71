"""Other people's attention, next to ours. One file per framework, imported only when asked for.

Such a file has VERSION; run(candidate, args, options, dout), which hands a candidate the framework's own arrays and
gets NumPy's back, (result, gradients), the latter None where the framework has none; and TARGETS, what the framework
is cross-checked on.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Target(NamedTuple):
    """One thing of a framework, called as the reference is."""

    name: str
    like: str  # the mechanism or primitive
    function: object  # takes and gives the framework's arrays; raises NotHandled for what the framework lacks, and
    # Departure for what it is known to do otherwise
    example: object = None  # draws the calls, where those of the mechanism's own example seldom fit
    dtypes: tuple = ("float64", "float32")
    arithmetic: Mapping = MappingProxyType({})  # dtype -> what it promises, where `check` would not know
    convention: str | None = None  # of refattn.oracle.conventions.PRESETS
    gradients: bool = True  # False: the framework has none of it
    times: int = 1  # how many times as many examples as others: where there are many families of inputs


EXTRAS = {"onnxruntime": "onnx"}  # framework -> the extra that installs it, where it has another name


class Status(NamedTuple):
    version: str  # empty where it cannot be imported
    reason: str  # why not


def names():
    """The frameworks that have a file here."""
    return [info.name for info in pkgutil.iter_modules(__path__) if info.name[0] != "_"]


def load(name):
    """The file of a framework, or an ImportError that says which extra to install."""
    if name not in names():
        raise ValueError(f"check: framework is {name!r}, expected one of {', '.join(names())}, or None for NumPy")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        extra = EXTRAS.get(name, name)
        raise ImportError(f"{name} cannot be imported ({error}): pip install 'refattn[{extra}]'") from error


def available():
    """{framework: Status} of all of them: the version, or the reason why not."""
    found = {}
    for name in names():
        try:
            found[name] = Status(load(name).VERSION, "")
        except ImportError as error:
            found[name] = Status("", str(error))
    return found
