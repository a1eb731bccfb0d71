"""Work that falls into parts, done part by part, and the parts on all cores."""

import collections
import contextlib
import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from refattn.core import tree_map

try:
    import threadpoolctl
except ImportError:
    threadpoolctl = None

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
    run = functools.partial(_run, function, np.geterr())
    tasks = [_workers().submit(run, some) for some in others]  # NumPy lets go of Python's lock while it computes
    results = [run(first), *(task.result() for task in tasks)]
    return tree_map(lambda *small: np.concatenate(small), *results)


def in_order(function, tasks, jobs, executor=None, ahead=None):
    """Yield function(*task) of every task, in order; `jobs` at a time, by threads or by an executor.

    So many more (`jobs`, unless given) may be done `ahead`, while an earlier one is waited for: their results wait too.
    """
    if executor is None and jobs == 1:
        yield from itertools.starmap(function, tasks)
        return
    with contextlib.ExitStack() as stack:
        if executor is None:
            if threadpoolctl is not None:  # threads of threads get into each other's way
                stack.enter_context(threadpoolctl.threadpool_limits(1, "blas"))
            executor = stack.enter_context(ThreadPoolExecutor(jobs))
        waiting = collections.deque()
        for task in tasks:
            waiting.append(executor.submit(function, *task))
            if len(waiting) >= jobs + (jobs if ahead is None else ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def usual_jobs():
    """How many threads in_order should use: all cores, or 1 where NumPy's own threads cannot be told to keep still."""
    return 1 if threadpoolctl is None else os.cpu_count() or 1


def _channels(trees, some):
    return tree_map(lambda a: a[:, some] if a.ndim > 1 else a[some], trees)


def _run(function, errors, trees):
    """function(*trees) with the caller's np.errstate, and a small buffer: NumPy copies what it stretches over a row."""
    before = np.setbufsize(4096)
    try:
        with np.errstate(**errors):
            return function(*trees)
    finally:
        np.setbufsize(before)


@functools.cache
def _workers():
    return ThreadPoolExecutor(max((os.cpu_count() or 2) - 1, 1), "refattn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
