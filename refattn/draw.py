"""Drawing one small call of a mechanism, from a seed. The tests draw with Hypothesis instead."""

import numpy as np

from refattn.core import tree_map


class RandomDraw:
    """The questions an `example` function may ask, answered by a random number generator."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def size(self, name, low=1, high=4):
        """A length from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def choice(self, name, *options):
        """One of the options."""
        return options[self.rng.integers(len(options))]

    def array(self, *shape):
        """Numbers of order one."""
        return self.rng.normal(size=shape)

    def mask(self, *shape):
        """True and False; rows and columns without any True occur."""
        return self.rng.random(shape) < 0.7

    def integers(self, low, high, *shape):
        """Whole numbers from low to high, both included: token ids, lengths."""
        return self.rng.integers(low, high + 1, size=shape)

    def like(self, tree):
        """Arrays of the same shapes with no special values: zeros would hide a wrong gradient."""
        return tree_map(lambda leaf: self.array(*leaf.shape), tree)
