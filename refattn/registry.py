"""Find every mechanism by walking the package: a file is registered by being there."""

import difflib
import functools
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

import refattn.attention as attention
import refattn.primitives as primitives


@dataclass(frozen=True)
class Mechanism:
    """One file, as everything else sees it: tests, CLI, docs table, adapters, plots."""

    name: str  # the file's name
    family: str  # its folder's name
    module: ModuleType

    def __getattr__(self, attribute):  # forward, backward, init, example, Params, Saved, ABOUT
        return getattr(self.module, attribute)

    def __str__(self):
        return self.name

    @property
    def title(self):
        """The first line of the file."""
        return self.module.__doc__.partition("\n")[0].rstrip(".")

    @property
    def paper(self):
        """The reference after `Paper:`, on one line; empty for a primitive."""
        _, found, rest = self.module.__doc__.partition("Paper:")
        return " ".join(rest.partition("\n\n")[0].split()) if found else ""


@functools.cache
def _paths(package):
    """{name: dotted path} of the files below a package, without importing them."""
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return {info.name.rpartition(".")[2]: info.name for info in found if not info.ispkg}


def _load(path):
    *_, family, name = path.split(".")
    return Mechanism(name, family, importlib.import_module(path))


@functools.cache
def mechanisms():
    """{name: Mechanism} of every file in refattn/attention, by family and name."""
    found = map(_load, _paths(attention).values())
    return {m.name: m for m in sorted(found, key=lambda m: (m.family, m.name))}


@functools.cache
def everything():
    """Primitives and mechanisms: they keep the same protocol, so they share the same tests."""
    return {name: _load(path) for name, path in sorted(_paths(primitives).items())} | mechanisms()


def find(name):
    """The mechanism or primitive of this name; a KeyError that offers near misses where there is none."""
    paths = _paths(primitives) | _paths(attention)
    if name not in paths:
        near = difflib.get_close_matches(name, paths, 3, 0.5)
        raise KeyError(f"no mechanism {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return _load(paths[name])
