"""Recordings of other people's code, and how they map to refattn: one module per system, each with `case(record)`.

A recording holds inputs, parameters, outputs and gradients under official names. A `Case` says which file of
refattn it belongs to, and builds our arguments from official names. Since the builders only reshape, permute, slice
and stack, the very same builder turns the recorded gradients into the gradients we expect.
"""

import json
import re
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    module: ModuleType  # has forward and backward
    args: Callable  # get -> positional arguments; get("in.x"), get("param.fc.weight") or get(..., optional=True)
    out: Callable  # get -> our out, from get("out.y")
    options: dict | None = None
    after: Callable | None = None  # saved -> {official buffer name: value after the call}
    mid: Callable | None = None  # (out, saved) -> {official name: intermediate value}


class Record:
    """One recording: `meta`, and arrays by "kind.name"; kinds in, param, buf, bufafter, out, gout, gin, ..."""

    def __init__(self, name, meta, arrays):
        self.name, self.meta, self.arrays = name, meta, arrays
        self.system = meta["system"]
        self.ctor = meta.get("ctor", {})
        self.training = meta.get("mode", "").startswith("train")

    @classmethod
    def load(cls, path):
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return cls(path.stem, json.loads(arrays.pop("meta").item()), arrays)

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        return self.arrays[key]

    def names(self, kind):
        return [key for key in self.arrays if key.partition(".")[0] == kind]

    def values(self):
        """The getter of recorded values."""
        return self._getter({})

    def gradients(self):
        """The getter of recorded gradients: in -> gin, param -> gparam, out -> gout; NaN where there is none."""
        return self._getter({"in": "gin", "param": "gparam", "out": "gout"})

    def _getter(self, rename):
        seen = set()

        def get(key, optional=False):
            kind, _, name = key.partition(".")
            actual = f"{rename.get(kind, kind)}.{name}"
            seen.add(actual)
            if actual in self.arrays:
                return self.arrays[actual]
            if optional and key not in self.arrays:
                return None
            return np.full_like(self.arrays[key], np.nan, dtype=float)

        get.seen = seen
        return get


def read_index(text):
    """A record for every entry of INDEX.md, filled with unrelated numbers: mapping can be tried on all of them."""
    rng = np.random.default_rng(0)
    for entry in re.split(r"^### ", text, flags=re.M)[1:]:
        name = entry.split(".npz")[0]
        line = re.search(r"^\* ctor `(\{.*?\})`(?: (\{.*?\}))?; mode (.*?);", entry, re.M)
        cls = re.search(r"class `(.*?)`", entry)
        system, _, case = name.partition("__")
        meta = {"system": system, "case": case, "cls": cls[1] if cls else "", "mode": line[3]}
        meta |= {"ctor": json.loads(line[1]), **json.loads(line[2] or "{}")}
        arrays = {}
        for kind in ("in", "param", "buf", "out", "mid"):
            listed = re.search(rf"^\* {kind}: (.*)$", entry, re.M)
            for key, shape, dtype in re.findall(r"(\S+?)\[([\d, ]*)\](?::(\w+))?", listed[1] if listed else ""):
                shape = tuple(int(n) for n in shape.split(",") if n.strip())
                arrays[f"{kind}.{key}"] = _values(rng, key, shape, dtype)
        yield Record(name, meta, arrays)


def _values(rng, key, shape, dtype):
    if dtype.startswith("int"):
        return np.maximum(rng.integers(1, 4, shape), np.arange(shape[0]) == 0 if len(shape) == 1 else 0).astype(dtype)
    if key.endswith("mask"):
        return np.ones(shape)
    values = rng.normal(size=shape)
    if key == "a":  # a matrix to take the root of: positive definite
        return values @ values.swapaxes(1, 2)
    return np.abs(values) + 0.5 if key.endswith(("var", "riv")) else values
