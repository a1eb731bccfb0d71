"""The mean over the bin of t: pixel s is in it where [s, s + 1) and [t S / T, (t + 1) S / T) overlap."""

import itertools


def element(args, options, where, index):
    (x,) = args
    n, c, *t = index
    space, size = x.shape[2:], options["size"]
    sizes = size if isinstance(size, tuple) else [size] * len(space)
    axes = [[s for s in range(S) if s * T < (i + 1) * S and (s + 1) * T > i * S] for i, S, T in zip(t, space, sizes)]
    values = [x[(n, c, *s)] for s in itertools.product(*axes)]
    return sum(values) / len(values)
