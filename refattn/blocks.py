"""Work that treats every channel for itself, done on large arrays part by part, and the parts on all cores."""

import contextvars
import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from refattn.core import tree_map

PART = 2**22  # bytes: threads gain nothing on less, and much more does not stay in the cache


def by_channels(function, *trees, expansion=1):
    """function(*trees) for some channels at a time: it fills arrays that are large, and returns a tree of small ones.

    Channels are axis 1 of every array, or axis 0 of one with a single axis, as all those that are returned. The first
    tree is an array, and the temporaries of `function` are `expansion` times as large. Parts depend on sizes alone,
    not on the machine.
    """
    channels = trees[0].shape[1]
    parts = min(channels, -(-expansion * trees[0].nbytes // PART))
    if parts <= 1:
        return function(*trees)
    edges = [channels * i // parts for i in range(parts + 1)]
    first, *others = (_channels(trees, slice(start, stop)) for start, stop in itertools.pairwise(edges))
    # NumPy lets go of Python's lock while it computes; the context brings np.errstate along
    tasks = [_workers().submit(contextvars.copy_context().run, _run, function, some) for some in others]
    results = [_run(function, first), *(task.result() for task in tasks)]
    return tree_map(lambda *small: np.concatenate(small), *results)


def _channels(trees, some):
    return tree_map(lambda a: a[:, some] if a.ndim > 1 else a[some], trees)


def _run(function, trees):
    """function(*trees) with a small buffer: NumPy fills it with copies where it stretches one value over a row."""
    before = np.setbufsize(4096)
    try:
        return function(*trees)
    finally:
        np.setbufsize(before)


@functools.cache
def _workers():
    return ThreadPoolExecutor(max(os.cpu_count() - 1, 1), "refattn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
