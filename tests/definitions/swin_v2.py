"""Liu et al. 2022, section 3, as in the authors' code, for one query and one feature of its value."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    b, h, i, e = index
    (m, w), trained = options["window"], options["pretrained"] or options["window"]
    features = range(q.shape[3])

    def log_spaced(distance, length):
        distance = 8 * distance / (length - 1) if length > 1 else 8 * distance
        return math.copysign(math.log(1 + abs(distance), 8), distance)

    def bias(j):
        dy = log_spaced(i // w - j // w, trained[0])
        dx = log_spaced(i % w - j % w, trained[1])
        total = 0.0
        for unit in range(len(params.b1)):
            hidden = params.w1[unit, 0] * dy + params.w1[unit, 1] * dx + params.b1[unit]
            total += params.w2[h, unit] * max(hidden, 0.0)
        return 8 * (1 + math.tanh(total / 2))

    def length(x, t):
        return max(math.sqrt(sum(x[b, h, t, d] ** 2 for d in features)), 1e-12)

    sharpness = math.exp(min(params.logit_scale[h], math.log(100)))
    weight = {}
    for j in range(m * w):
        if options["mask"] is None or options["mask"][b, h, i, j]:
            dot = sum(q[b, h, i, d] * k[b, h, j, d] for d in features)
            weight[j] = sharpness * dot / (length(q, i) * length(k, j)) + bias(j)
    if not weight:
        return 0.0
    top = max(weight.values())
    weight = {j: math.exp(s - top) for j, s in weight.items()}
    return sum(a * v[b, h, j, e] for j, a in weight.items()) / sum(weight.values())
