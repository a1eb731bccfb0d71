"""Every recording in the folder REFATTN_GOLDEN (default ../shared/golden): outputs and all gradients, to 1e-12.

A recording that cannot be mapped fails. Where there is no folder, this is a visible skip.
"""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

from refattn.core import leaves, tree_map
from tests.golden import Record, read_index

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "golden"
FOLDER = Path(os.environ.get("REFATTN_GOLDEN", DEFAULT))
FILES = sorted(FOLDER.glob("*.npz"))
INDEX = list(read_index((FOLDER / "INDEX.md").read_text())) if (FOLDER / "INDEX.md").exists() else []
MISSING = pytest.mark.skipif(not FILES, reason=f"no recordings in {FOLDER}: set REFATTN_GOLDEN")


def case_of(record):
    return importlib.import_module(f"tests.golden.{record.system}").case(record)


def close(story, expected, got, tolerance=1e-12):
    """To `tolerance` of the largest entry; NaN in either fails."""
    assert expected.shape == got.shape, f"{story}: shape {got.shape}, but should be {expected.shape}"
    worst, size = np.abs(expected - got).max(initial=0), np.abs(expected).max(initial=0)
    assert worst <= tolerance * max(1, size), f"{story}: off by {worst:.3g}, largest entry {size:.3g}"


def run(record):
    """Our out, saved and gradients, and the getters of recorded values and gradients."""
    case, value, gradient = case_of(record), record.values(), record.gradients()
    out, saved = case.module.forward(*case.args(value), **(case.options or {}))
    cotangent = tree_map(np.nan_to_num, case.out(gradient))
    grads = tuple(case.module.backward(cotangent, saved))
    return case, out, saved, grads, value, gradient


@MISSING
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recording(path):
    record = Record.load(path)
    case, out, saved, grads, value, gradient = run(record)
    for (where, expected), (_, got) in zip(leaves(case.out(value)), leaves(out), strict=True):
        close(f"out {where}", expected, got)
    for (where, expected), (_, got) in zip(leaves(case.args(gradient)), leaves(grads), strict=True):
        if not np.isnan(expected).all() or expected.size == 0:  # all NaN: the recording has no such gradient
            close(f"gradient of {where}", expected, got)
    ours = {} if case.after is None else case.after(saved)
    tolerance = 3e-7 if record.system == "pfanet" else 1e-12  # legacy Keras keeps the decay constant in float32
    for name in record.names("bufafter"):
        close(name, record[name], ours[name.partition(".")[2]], tolerance)
    for name, got in ({} if case.mid is None else case.mid(out, saved)).items():
        close(f"mid.{name}", record[f"mid.{name}"], got)
    due = {name for kind in ("gin", "gparam", "gout") for name in record.names(kind)}
    assert due <= gradient.seen, f"recorded, but never compared: {sorted(due - gradient.seen)}"


@pytest.mark.skipif(not INDEX, reason=f"no INDEX.md in {FOLDER}")
@pytest.mark.parametrize("record", INDEX, ids=lambda record: record.name)
def test_every_listed_recording_maps(record):
    """Also those whose files are not here: class, constructor and names map, and the shapes come out right."""
    case, out, _, grads, value, _ = run(record)
    for (where, expected), (_, got) in zip(leaves(case.out(value)), leaves(out), strict=True):
        assert expected.shape == got.shape, f"out {where}: shape {got.shape}, but should be {expected.shape}"
    for (where, expected), (_, got) in zip(leaves(case.args(value)), leaves(grads), strict=True):
        assert expected.shape == got.shape, f"gradient of {where}: shape {got.shape}, not {expected.shape}"
    due = {name for kind in ("param", "out") for name in record.names(kind)}
    assert due <= value.seen, f"listed, but not mapped: {sorted(due - value.seen)}"
