"""Li et al. 2022, with fractions for the indices, for one query and one feature of its value."""

import math
from fractions import Fraction


def vector(table, length, position, d):
    """Feature d at `position` of the table stretched to `length`: half a pixel past its ends is the end itself."""
    at = (position + Fraction(1, 2)) * Fraction(len(table), length) - Fraction(1, 2)
    at = max(Fraction(0), min(at, Fraction(len(table) - 1)))
    below, share = math.floor(at), at - math.floor(at)
    return float(1 - share) * table[below, d] + (float(share) * table[below + 1, d] if share else 0)


def index_of(y, z, queries, keys):
    stretch_q, stretch_k = (max(Fraction(a, b), Fraction(1)) for a, b in ((keys, queries), (queries, keys)))
    return math.floor(y * stretch_q - z * stretch_k + (keys - 1) * stretch_k)


def element(args, options, where, index):
    q, k, v, params = args
    *lead, i, e = index
    features, prefix = q.shape[-1], options["prefix"]
    (h, w), (m, n) = options["size"], options["key_size"] or options["size"]
    scale = options["scale"] or 1 / math.sqrt(features)
    weight = []
    for j in range(k.shape[-2]):
        score = scale * sum(q[(*lead, i, d)] * k[(*lead, j, d)] for d in range(features))
        if i >= prefix and j >= prefix:
            (y, x), (z, u) = divmod(i - prefix, w), divmod(j - prefix, n)
            row, column = index_of(y, z, h, m), index_of(x, u, w, n)
            for d in range(features):
                bias = vector(params.rows, 2 * max(h, m) - 1, row, d)
                bias += vector(params.columns, 2 * max(w, n) - 1, column, d)
                score += q[(*lead, i, d)] * bias * (scale if options["scale_bias"] else 1)
        weight.append(score)
    top = max(weight)
    weight = [math.exp(s - top) for s in weight]
    return sum(a * v[(*lead, j, e)] for j, a in enumerate(weight)) / sum(weight)
