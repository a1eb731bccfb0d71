"""Where the error is, in words.

    region(trial)      "dk, dv: head 1 of 4, keys from 64 on (the last tile of 64), all columns"
"""

import itertools
import math

import numpy as np

TILES = 128, 64, 32, 16
FEW = 4  # indices that are told one by one
ITEM, HEAD, ROW, COLUMN = ("item", "items"), ("head", "heads"), ("row", "rows"), ("column", "columns")
QUERY, KEY = ("query", "queries"), ("key", "keys")
AXES = {  # of dot-product attention
    "out": (ITEM, HEAD, ROW, COLUMN),
    "lse": (ITEM, HEAD, ROW),
    "dq": (ITEM, HEAD, ROW, COLUMN),
    "dk": (ITEM, HEAD, KEY, COLUMN),
    "dv": (ITEM, HEAD, KEY, COLUMN),
    "dattn_bias": (ITEM, HEAD, QUERY, KEY),
    "dsinks": (HEAD,),
}


def region(trial):
    """Where a trial is wrong: which arrays, and which items, heads, rows and columns of them. "" if it conforms."""
    stories = {}
    for verdict in trial.verdicts:
        if not verdict.conforms:
            stories.setdefault(verdict.problem or _where(trial, verdict.name), []).append(verdict.name)
    return "; ".join(f"{', '.join(names)}: {story}" for story, names in stories.items())


def _where(trial, name):
    expected, got = trial.expected[name], np.asarray(trial.got[name]).astype(np.float64)
    with np.errstate(all="ignore"):
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        outside = ~(same | (np.abs(got - expected) <= trial.bounds[name].least))
    labels = _labels(trial, name, expected.ndim)
    indices = [np.unique(x) for x in np.nonzero(outside)]
    phrases = [_indices(found, n, *label) for found, n, label in zip(indices, expected.shape, labels)]
    diagonal, keyless = _by_diagonal(name, outside), _without_keys(trial, name, outside)
    if diagonal:
        phrases[-2:] = [diagonal]
    if keyless:
        phrases[labels.index(ROW)] = keyless
    told = [p for p in phrases if p]
    told = told if any(not p.startswith("all ") for p in told) else ["everywhere"]
    count, box = int(outside.sum()), math.prod(map(len, indices))
    part = f" ({count} of {box} elements there)" if 2 * count < box and not diagonal else ""
    return ", ".join([p for p in (_what_is_there(got[outside]),) if p] + told) + part


def _what_is_there(got):
    if np.isnan(got).all():
        return "NaN"
    if np.isinf(got).all():
        return "infinite"
    if np.isnan(got).any():
        return "NaN and wrong numbers"
    return "" if got.any() else "zero"


def _labels(trial, name, ndim):
    """(one, several) for each axis; where there are no heads, there is no axis for them."""
    attention = len(trial.call.args) >= 3 and set(trial.expected) <= set(AXES)
    axes = AXES[name] if attention else ()
    if attention and ndim == len(axes) - 1 and name != "dattn_bias":
        axes = tuple(a for a in axes if a != HEAD)
    if name == "dattn_bias":
        axes = axes[4 - ndim :]
    return axes if len(axes) == ndim else [(f"index of axis {a}", f"indices of axis {a}") for a in range(ndim)]


def _by_diagonal(name, outside):
    """Where in (Q, K) of the gradient of a bias, if the diagonal tells."""
    if name != "dattn_bias" or min(outside.shape[-2:], default=0) < 2 or outside.ndim < 2:
        return ""
    *_, i, j = np.nonzero(outside)
    if len(i) < 2:
        return ""
    sides = {
        "on the diagonal": j == i,
        "just above the diagonal": j == i + 1,
        "just below the diagonal": j == i - 1,
        "above the diagonal": j > i,
        "below the diagonal": j < i,
    }
    return next((words for words, holds in sides.items() if holds.all()), "")


def _without_keys(trial, name, outside):
    """Rows that attend to nothing have an lse of -inf."""
    lse = trial.expected.get("lse")
    if name not in ("out", "lse", "dq") or lse is None or outside.shape[: lse.ndim] != lse.shape:
        return ""
    rows = outside if name == "lse" else outside.any(axis=-1)
    return "" if (rows & ~np.isneginf(lse)).any() else "only rows without a key"


def _indices(found, length, one, several):
    """Which of `length` indices were found, in words; nothing if there is only one."""
    n, first, last = len(found), int(found[0]), int(found[-1])
    if length == 1:
        return ""
    if n == length:
        return f"all {several}"
    if n == 1:
        return f"the last {one} of {length}" if first == length - 1 > 7 else f"{one} {first} of {length}"
    if last - first + 1 == n:
        return _range(first, last, length, several)
    steps = {int(b - a) for a, b in itertools.pairwise(found)}
    if len(steps) == 1 and n > 2:
        (step,) = steps
        start = f" from {first}" if first else ""
        end = f" to {last}" if last + step < length else ""
        return f"every {_ordinal(step)} {one}" + start + (end or (" on" if start else ""))
    for tile in TILES:
        touched = sorted({int(x) // tile for x in found})
        if len(touched) <= FEW and sum(min(tile, length - t * tile) for t in touched) == n:
            return f"tiles {', '.join(map(str, touched))} of {tile} {several}"
    if n <= FEW:
        return f"{several} {', '.join(map(str, found))} of {length}"
    return f"{n} of {length} {several}, from {first} to {last}"


def _range(first, last, length, several):
    n = last - first + 1
    tile = next((t for t in TILES if t < length and first % t == 0 and last + 1 == min(first + t, length)), None)
    which = "the last" if last + 1 == length else "a" if first else "the first"
    note = "" if tile is None else f" ({which} tile of {tile})"
    if last + 1 == length:
        return (f"the last {n} {several} of {length}" if n <= FEW else f"{several} from {first} on") + note
    if not first and n <= FEW:
        return f"the first {n} {several} of {length}"
    return f"{several} {first} to {last}" + note


def _ordinal(n):
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
