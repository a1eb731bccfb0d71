"""Vaswani et al. 2017, section 3.2.2: MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, one number of it."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    b, i, o = index
    heads, mask, key_mask, keys = options["heads"], options["mask"], options["key_mask"], k.shape[1]

    def width(x, projection):
        return x.shape[2] if projection is None else projection.weight.shape[0]

    compared, passed = width(q, params.q) // heads, width(v, params.v) // heads

    def projected(x, t, projection, unit):
        if projection is None:
            return x[b, t, unit]
        weight, bias = projection
        total = sum(weight[unit, f] * x[b, t, f] for f in range(x.shape[2]))
        return total if bias is None else total + bias[unit]

    def token(x, j, projection, learned, unit):
        """Of the keys or the values: their own, then the learned one, then zero."""
        if j < keys:
            return projected(x, j, projection, unit)
        return learned[unit] if learned is not None and j == keys else 0.0

    extra = (params.bias_k is not None) + options["add_zero_attn"]

    def passed_on(unit):
        h = unit // passed
        seen = [
            j
            for j in range(keys)
            if (mask is None or mask[b, h, i, j])
            and (key_mask is None or key_mask[b, j])
            and (j <= i or not options["is_causal"])
        ] + list(range(keys, keys + extra))
        units = range(h * compared, (h + 1) * compared)
        score = {
            j: sum(projected(q, i, params.q, u) * token(k, j, params.k, params.bias_k, u) for u in units)
            / math.sqrt(compared)
            for j in seen
        }
        e = {j: math.exp(score[j] - max(score.values())) for j in seen}
        return sum(e[j] / sum(e.values()) * token(v, j, params.v, params.bias_v, unit) for j in seen)

    if params.out is None:
        return passed_on(o)
    y = sum(params.out.weight[o, unit] * passed_on(unit) for unit in range(heads * passed))
    return y if params.out.bias is None else y + params.out.bias[o]
