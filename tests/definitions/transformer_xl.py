"""Dai et al. 2019, the terms (a) to (d) of the relative attention score, for one query and one feature of its value."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    b, h, i, e = index
    keys, features, inputs = k.shape[2], q.shape[3], params.w_r.shape[2]
    memory = keys - q.shape[2]
    scale = options["scale"] or 1 / math.sqrt(features)

    def wave(n, p):
        half = inputs // 2
        angle = n / 10000 ** ((p % half) / half)
        return math.sin(angle) if p < half else math.cos(angle)

    weight = {}
    for j in range(keys):
        n = memory + i - j
        if n < 0 or (options["mask"] is not None and not options["mask"][b, h, i, j]):
            continue
        far = n if options["clamp"] is None else min(n, options["clamp"])
        r = [sum(params.w_r[h, d, p] * wave(far, p) for p in range(inputs)) for d in range(features)]
        score = 0.0
        for d in range(features):
            score += q[b, h, i, d] * k[b, h, j, d] + q[b, h, i, d] * r[d]
            score += params.u[h, d] * k[b, h, j, d] + params.v[h, d] * r[d]
        weight[j] = scale * score
    if not weight:
        return 0.0
    top = max(weight.values())
    weight = {j: math.exp(s - top) for j, s in weight.items()}
    return sum(w * v[b, h, j, e] for j, w in weight.items()) / sum(weight.values())
