"""Shazeer et al. 2020, section 4: J = Q K^T, S = J P_l, W = softmax(S), U = W P_w, O = U V, one number of O."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    b, o, i, e = index
    (before, l_bias), (after, w_bias) = params
    features = q.shape[3]
    seen = [
        j
        for j in range(k.shape[2])
        if (options["mask"] is None or options["mask"][b, i, j]) and not (options["is_causal"] and j > i)
    ]

    def score(h, j):
        total = 0.0 if l_bias is None else l_bias[h]
        for head in range(q.shape[1]):
            product = sum(q[b, head, i, d] * k[b, head, j, d] for d in range(features))
            total += before[h, head] * product * (options["scale"] or features**-0.5)
        return total

    weight = dict.fromkeys(seen, 0.0 if w_bias is None else w_bias[o])
    for h in range(before.shape[0]):
        scores = {j: score(h, j) for j in seen}
        lse = math.log(sum(math.exp(s - max(scores.values())) for s in scores.values())) if seen else 0.0
        for j in seen:
            weight[j] += after[o, h] * math.exp(scores[j] - max(scores.values()) - lse)
    return sum((weight[j] * v[b, o, j, e] for j in seen), 0.0)
