"""Lee et al. 2019, equations 3 to 6, as the authors' code has the row-wise network: one number of the output."""

import math


def element(args, options, where, index):
    q, x, params = args
    b, i, d = index

    def affine(row, projection):
        weight, bias = projection
        return [
            math.fsum(w * a for w, a in zip(weight[unit], row)) + (0 if bias is None else bias[unit])
            for unit in range(weight.shape[0])
        ]

    def normed(row, norm):
        if norm is None:
            return row
        mean = math.fsum(row) / len(row)
        variance = math.fsum((a - mean) ** 2 for a in row) / len(row)
        return [
            g * (a - mean) / math.sqrt(variance + options["eps"]) + c for a, g, c in zip(row, norm.gamma, norm.beta)
        ]

    query, width = affine(q[b, i], params.q), params.q.weight.shape[0]
    a = list(query)
    for unit in range(width):
        size = width // options["heads"]
        head = range(unit - unit % size, unit - unit % size + size)
        top = bottom = 0.0
        for j in range(x.shape[1]):
            if options["key_mask"] is None or options["key_mask"][b, j]:
                key, value = affine(x[b, j], params.k), affine(x[b, j], params.v)
                weight = math.exp(math.fsum(query[c] * key[c] for c in head) / math.sqrt(width))
                top, bottom = top + weight * value[unit], bottom + weight
        a[unit] += top / bottom if bottom else 0.0
    n = normed(a, params.norm0)
    return normed([u + max(0.0, w) for u, w in zip(n, affine(n, params.out))], params.norm1)[d]
