"""Shaw et al. 2018, equations 3 to 5, for one query and one feature of its value."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    *lead, i, e = index
    features, keys, clip = q.shape[-1], k.shape[-2], len(params.keys) // 2
    scale = options["scale"] or 1 / math.sqrt(features)

    def row(j):
        return clip + max(-clip, min(clip, j - i - options["offset"]))

    weight = {}
    for j in range(keys):
        if options["mask"] is not None and not options["mask"][(*lead, i, j)]:
            continue
        if options["is_causal"] and j > i + options["offset"]:
            continue
        seen = [k[(*lead, j, d)] + params.keys[row(j), d] for d in range(features)]
        weight[j] = scale * sum(q[(*lead, i, d)] * seen[d] for d in range(features))
    if not weight:
        return 0.0
    top = max(weight.values())
    weight = {j: math.exp(s - top) for j, s in weight.items()}
    value = {j: v[(*lead, j, e)] + (0 if params.values is None else params.values[row(j), e]) for j in weight}
    return sum(w * value[j] for j, w in weight.items()) / sum(weight.values())
