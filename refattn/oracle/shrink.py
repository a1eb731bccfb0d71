"""From a call that fails to a smaller one that fails too: fewer options, items, heads, queries, keys and features."""

import numpy as np

from refattn.oracle.canonical import as_dot_product, as_it_was
from refattn.oracle.contract import NotHandled
from refattn.oracle.trial import try_call

TRIES = 250
AXES = {  # of the arrays of a call, with "1" where a length may also be 1
    "q": "BHQD", "k": "BGKD", "v": "BWKE", "attn_bias": "BHQK", "sinks": "H",
    "attn_mask": "BHQK", "dropout_keep": "BHQK", "q_seqlens": "B", "kv_seqlens": "B", "q_offset": "B",
}  # fmt: skip
ARGUMENTS = "q", "k", "v", "attn_bias", "sinks"
TOGETHER = {"dropout_keep": ("dropout_keep", "dropout_p"), "dropout_p": ("dropout_keep", "dropout_p")}


def shrink(judge, trial):
    """The smallest Trial found that fails in an array in which this one does; of dot-product attention only."""
    if as_dot_product(judge.mechanism, trial.call) is None:
        return trial
    failing = {v.name for v in trial.verdicts if not v.conforms}
    tries, smaller = 0, True
    while smaller and tries < TRIES:
        smaller = False
        for canonical in _smaller(as_dot_product(judge.mechanism, trial.call)):
            tries += 1
            found = _fails(judge, trial, canonical, failing)
            if found is not None:
                trial, smaller = found, True
                break
            if tries == TRIES:
                break
    return trial


def _fails(judge, trial, canonical, failing):
    call = as_it_was(judge.mechanism, canonical, trial.call)
    try:
        found = try_call(judge, call, trial.family, False, trial.seed)
    except (NotHandled, ValueError, TypeError):
        return None
    return found if found.failed and failing & {v.name for v in found.verdicts if not v.conforms} else None


def _smaller(call):
    """Yield calls that are a little smaller, the boldest first."""
    arrays = dict(zip(ARGUMENTS, call.args)) | call.options
    sizes = dict(zip("BHQD", call.args[0].shape)) | dict(zip("GK", call.args[1].shape[1:]))
    sizes |= {"W": call.args[2].shape[1], "E": call.args[2].shape[3]}
    for axis in "BQKDE":
        n = sizes[axis]
        for some in (slice(0, 1), slice(n // 2, n), slice(0, n // 2), slice(1, n), slice(0, n - 1)):
            if 0 < len(range(n)[some]) < n:
                yield _cut(call, arrays, sizes, {axis: some})
    least = max(sizes["G"], sizes["W"])
    for keep in {1, sizes["H"] // least} - {sizes["H"]}:
        for first in range(0, sizes["H"], keep):  # some heads that share
            some = {"H": slice(first, first + keep)}
            for axis in "GW":
                at = first * sizes[axis] // sizes["H"]
                some[axis] = slice(at, at + 1)
            yield _cut(call, arrays, sizes, some)
    for name in [n for n in (*ARGUMENTS[3:], *call.options) if arrays.get(n) is not None and n != "convention"]:
        yield _call(arrays | dict.fromkeys(TOGETHER.get(name, (name,))), call)


def _cut(call, arrays, sizes, some):
    """The call with some of each axis."""
    cut = {}
    for name, x in arrays.items():
        cut[name] = x
        if not isinstance(x, np.ndarray) or name not in AXES or x.ndim == 0:
            continue
        axes = AXES[name][-x.ndim :]
        index = [some[a] if a in some and n == sizes[a] else slice(None) for a, n in zip(axes, x.shape)]
        cut[name] = np.ascontiguousarray(x[tuple(index)])
    for name, axis in (("q_seqlens", "Q"), ("kv_seqlens", "K")):
        if cut.get(name) is not None and axis in some:
            cut[name] = np.minimum(cut[name], len(range(sizes[axis])[some[axis]]))
    return _call(cut, call)


def _call(arrays, call):
    args = [arrays[name] for name in ARGUMENTS[: len(call.args)]]
    options = {name: arrays[name] for name in call.options if arrays[name] is not None}
    return call._replace(args=tuple(args), options=options)
