"""Large arrays some channels at a time, on all cores: for work that treats every channel for itself.

An operation on a large array waits for memory, and a temporary of its size costs more than its arithmetic. In a
block of channels the temporaries are small and stay in the cache. Blocks depend on shapes alone: the result is the
same to the last bit on any number of cores.
"""

import contextvars
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 2**19  # bytes of the first array in one block: a few such arrays fit into a core's cache


def by_channels(function, *arrays):
    """function(*arrays), a tuple of arrays; channels are axis 1 of everything, or axis 0 where there is no other."""
    channels, nbytes = arrays[0].shape[1], arrays[0].nbytes
    step = max(1, BLOCK * channels // max(nbytes, 1))
    if step >= channels:
        return function(*arrays)

    def apply(start):
        return function(*(a[_channels(a, start, step)] for a in arrays))

    def fill(start, parts):
        for whole, part in zip(results, parts):
            whole[_channels(whole, start, step)] = part

    first = apply(0)
    results = tuple(np.empty((*p.shape[: p.ndim > 1], channels, *p.shape[2:]), p.dtype) for p in first)
    fill(0, first)
    on_all_cores(lambda start: fill(start, apply(start)), range(step, channels, step))
    return results


def _channels(array, start, step):
    return (*(slice(None),) * (array.ndim > 1), slice(start, start + step))


def on_all_cores(work, items):
    """work(item) for all items, several at a time: NumPy lets go of Python's lock while it computes."""
    tasks = [_workers().submit(contextvars.copy_context().run, work, item) for item in items]  # np.errstate goes along
    for task in tasks:
        task.result()


@functools.cache
def _workers():
    return ThreadPoolExecutor(os.cpu_count(), "refattn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork
