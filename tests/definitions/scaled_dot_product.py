"""Vaswani et al. 2017, equation 1, for one query and one feature of its value."""

import math


def element(args, options, where, index):
    q, k, v = args
    *lead, i, e = index
    features, keys = q.shape[-1], k.shape[-2]
    scale = options["scale"] or features**-0.5
    weight = {}
    for j in range(keys):
        if options["mask"] is not None and not options["mask"][(*lead, i, j)]:
            continue
        if options["is_causal"] and j > i:
            continue
        weight[j] = scale * sum(q[(*lead, i, d)] * k[(*lead, j, d)] for d in range(features))
    if not weight:
        return 0.0
    top = max(weight.values())
    weight = {j: math.exp(s - top) for j, s in weight.items()}
    return sum(w * v[(*lead, j, e)] for j, w in weight.items()) / sum(weight.values())
