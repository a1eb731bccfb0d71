"""Dai et al. 2019, section 3.2: the embedded Gaussian of Wang et al. 2018 inside every tile of a grid."""

import itertools
import math


def element(args, options, where, index):
    x, params = args
    n, c, row, col = index
    grid, pool = options["grid"], options["pool"]

    def tile(place, length):
        """The pixels of the tile that this place is in."""
        ends = [k * length // grid for k in range(grid + 1)]
        return next(range(a, b) for a, b in itertools.pairwise(ends) if a <= place < b)

    rows, cols = tile(row, x.shape[2]), tile(col, x.shape[3])

    def pixel(d, i, j):
        return x[n, d, i, j]

    def feature(p, o, source, i, j):
        return (0 if p.bias is None else p.bias[o]) + sum(w * source(d, i, j) for d, w in enumerate(p.weight[o]))

    def largest(source, i, j):
        return max(source(i + a, j + b) for a in (0, 1) for b in (0, 1))

    def at_key(p, o, i, j):
        if pool == "after":
            return largest(lambda *place: feature(p, o, pixel, *place), i, j)
        if pool == "before":
            return feature(p, o, lambda d, *place: largest(lambda *q: pixel(d, *q), *place), i, j)
        return feature(p, o, pixel, i, j)

    def starts(side):
        return side if pool is None else list(side)[: len(side) // 2 * 2 : 2]

    keys = [(i, j) for i in starts(rows) for j in starts(cols)]
    theta = [feature(params.theta, k, pixel, row, col) for k in range(len(params.theta.weight))]
    scores = {key: sum(t * at_key(params.phi, k, *key) for k, t in enumerate(theta)) for key in keys}
    top = max(scores.values())
    likeness = {key: math.exp(s - top) for key, s in scores.items()}

    def response(d, *_):
        return sum(w * at_key(params.g, d, *key) for key, w in likeness.items()) / sum(likeness.values())

    return x[index] + feature(params.out, c, response, row, col)
