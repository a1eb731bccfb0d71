"""Other people's attention, next to ours. One file per framework, imported only when asked for.

Such a file has VERSION; run(candidate, args, options, dout), which hands a candidate the framework's own arrays and
gets NumPy's back, (result, gradients), the latter None where the framework has none; and TARGETS, what the framework
is cross-checked on.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
    convention: object = None  # a name of refattn.oracle.conventions.PRESETS, or a Convention
    gradients: bool = True  # False: the framework has none of it
    times: int = 1  # how many times as many examples as others: where there are many families of inputs
    device: str = "cpu"  # on which it computes
    lacks: object = None  # () -> what this machine has not, without which it cannot be judged, or ""


EXTRAS = {"onnxruntime": "onnx"}  # framework -> the extra that installs it, where it has another name
FAMILIES = {"keras": ("keras_jax", "keras_tensorflow", "keras_torch")}  # one name for several files
PATIENCE = 300  # seconds, for a framework to be imported


class Status(NamedTuple):
    version: str  # empty where it cannot be imported
    reason: str  # why not
    targets: tuple = ()  # (name, like, dtypes, whether its convention can be found by experiment) of each


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
        extra = EXTRAS.get(name, name.partition("_")[0])
        raise ImportError(f"{name} cannot be imported ({error}): pip install 'refattn[{extra}]'") from error


def status(name):
    """The Status of one of them; it is imported here."""
    try:
        adapter = load(name)
    except ImportError as error:
        return Status("", str(error))
    return Status(adapter.VERSION, "", tuple((t.name, t.like, tuple(t.dtypes), _asks(t)) for t in adapter.TARGETS))


def _asks(target):
    """One that takes calls of its own making only cannot be asked anything else."""
    return target.like == "dot_product_attention" and target.example is None


def available(wanted=None, jobs=1):
    """{framework: Status}. Each is imported in a process of its own: some do not go together, some die."""
    wanted = names() if wanted is None else wanted
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(wanted, pool.map(_status_apart, wanted)))


def _status_apart(name):
    code = f"import json; from refattn import frameworks; print('\\n' + json.dumps(frameworks.status({name!r})))"
    try:
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Status("", f"{name} cannot be imported within {PATIENCE} seconds")
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"it ends with status {ended.returncode}"])[-1]
        return Status("", f"{name} cannot be imported: {last}")
    version, reason, targets = json.loads(ended.stdout.strip().splitlines()[-1])
    return Status(version, reason, tuple((*names, tuple(dtypes), asks) for *names, dtypes, asks in targets))
