"""The calls on which a candidate is tried: drawn as a mechanism's own example says, some of them larger."""

import math

import numpy as np

from refattn.core import Call, leaves, tree_map
from refattn.draw import RandomDraw

LONG = 16, 40  # how much a stretched size is more than its least
SHOWN = 8  # arrays, when a call is put into words
LARGEST = 3000  # numbers in the arguments of a stretched call, or in its output


class Stretched(RandomDraw):
    """One or two sizes are much larger than the example asks for: the tiles of a kernel must be filled, and overrun."""

    def __init__(self, seed, which):
        self.rng = np.random.default_rng(seed) if which < 0 else Bounded(np.random.PCG64(seed))
        self.asked, self.which = 0, which  # how many sizes were asked for, and which is long for certain; -1: none is

    def size(self, name, low=1, high=4):
        self.asked += 1
        long = self.asked - 1 == self.which or (self.rng.random() < 0.2 and self.which >= 0)
        return low + int(self.rng.integers(*LONG)) if long else super().size(name, low, high)

    def like(self, tree):
        """Weights get smaller as they get wider, as they do in every network: what they make is of order one."""
        return tree_map(lambda leaf: self.array(*leaf.shape) / math.sqrt(max(1, math.prod(leaf.shape[1:]))), tree)


class Bounded(np.random.Generator):
    """Refuses to draw more numbers at once than a call may have."""

    def normal(self, loc=0.0, scale=1.0, size=None):
        if math.prod(np.atleast_1d(1 if size is None else size).tolist()) > LARGEST:
            raise ValueError(f"size is {size}, expected at most {LARGEST} numbers")
        return super().normal(loc, scale, size)


def draw_call(mechanism, example, seed):
    """The call of a seed, a list of numbers. Two of three are stretched, every size in its turn, if it can be."""
    turn = seed[-1]
    if turn % 3:
        count = Stretched(seed, which=-1)
        example(count)
        for attempt in range(turn, turn + 8):
            try:
                call = example(Stretched([*seed, attempt], which=attempt % max(1, count.asked)))
                if _size(call.args) <= LARGEST and _size(mechanism.forward(*call.args, **call.options)[0]) <= LARGEST:
                    return call
            except (ValueError, IndexError):
                continue  # what was drawn as a size must fit something else: the next size, then
    return example(RandomDraw(seed))


def _size(tree):
    return sum(x.size for _, x in leaves(tree))


def cast(tree, dtype):
    """A copy in which arrays of real numbers have this dtype."""

    def leaf(x):
        return np.array(x, dtype if x.dtype.kind == "f" else x.dtype) if isinstance(x, np.ndarray) else x

    return tree_map(leaf, tree)


def cast_call(call, dtype):
    args = tree_map(np.asarray, call.args)  # drawn scalars are arrays too; options stay what they are
    return Call(cast(args, dtype), {name: cast(value, dtype) for name, value in call.options.items()})


def rounded(call, dtype):
    """The call in float64, with numbers that `dtype` holds exactly."""
    return cast_call(cast_call(call, dtype), np.float64)


def in_words(call, names):
    """q (2, 3), k (4, 3), is_causal=True"""
    arrays = [f"{path} {x.shape}" for name, arg in zip(names, call.args) for path, x in leaves(arg, name)]
    options = [f"{k}={_short(v)}" for k, v in call.options.items()]
    more = [f"{len(arrays) - SHOWN} more"] if len(arrays) > SHOWN else []
    return ", ".join(arrays[:SHOWN] + more + options)


def _short(value):
    if isinstance(value, np.ndarray):
        return f"array{value.shape}"
    arrays = isinstance(value, tuple) and any(isinstance(x, np.ndarray) for _, x in leaves(value))
    return "..." if arrays else repr(value)
