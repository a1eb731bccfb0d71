"""Ye et al. 2024, equations 1 to 3: DiffAttn, the norm of one head, and 1 - lambda_init; one number of the output."""

import math


def element(args, options, where, index):
    q, k, v, p = args
    b, h, i, e = index
    features = q.shape[4]

    def dot(x, y):
        return math.fsum(s * t for s, t in zip(x, y))

    lam = math.exp(dot(p.lambda_q1, p.lambda_k1)) - math.exp(dot(p.lambda_q2, p.lambda_k2)) + options["lambda_init"]

    def probabilities(one):
        e_s = [0.0] * k.shape[3]
        for j in range(k.shape[3]):
            hidden = options["mask"] is not None and not options["mask"][b, h, i, j]
            if not hidden and not (options["is_causal"] and j > i):
                e_s[j] = math.exp((options["scale"] or 1 / math.sqrt(features)) * dot(q[b, h, one, i], k[b, h, one, j]))
        return [x / (sum(e_s) or 1.0) for x in e_s]

    difference = [first - lam * second for first, second in zip(probabilities(0), probabilities(1))]
    head = [sum(d * v[b, h, j, c] for j, d in enumerate(difference)) for c in range(v.shape[3])]
    size = math.sqrt(dot(head, head) / len(head) + options["eps"])
    gamma = 1.0 if p.norm is None else p.norm.gamma[e]
    return (1 - options["lambda_init"]) * gamma * head[e] / size
