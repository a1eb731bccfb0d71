"""Vaswani et al. 2017, section 3.2.2: MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, one number of it."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    b, i, o = index
    heads, mask, key_mask = options["heads"], options["mask"], options["key_mask"]
    compared, passed = params.q.weight.shape[0] // heads, params.v.weight.shape[0] // heads

    def projected(x, t, projection, unit):
        weight, bias = projection
        total = sum(weight[unit, f] * x[b, t, f] for f in range(x.shape[2]))
        return total if bias is None else total + bias[unit]

    y = 0.0 if params.out.bias is None else params.out.bias[o]
    for h in range(heads):
        seen = [
            j
            for j in range(k.shape[1])
            if (mask is None or mask[b, h, i, j])
            and (key_mask is None or key_mask[b, j])
            and (j <= i or not options["is_causal"])
        ]
        units = range(h * compared, (h + 1) * compared)
        score = {
            j: sum(projected(q, i, params.q, u) * projected(k, j, params.k, u) for u in units) / math.sqrt(compared)
            for j in seen
        }
        e = {j: math.exp(score[j] - max(score.values())) for j in seen}
        for unit in range(h * passed, (h + 1) * passed):
            for j in seen:
                y += params.out.weight[o, unit] * e[j] / sum(e.values()) * projected(v, j, params.v, unit)
    return y
