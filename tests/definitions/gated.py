"""Qiu et al. 2025, equations 1 to 5, the gate on what the scaled dot product gives: one number of the output."""

import math


def element(args, options, where, index):
    q, k, v, (attention, (gate, gate_bias)) = args
    b, i, o = index
    heads = options["heads"]

    def features(x, t, projection, head):
        weight, bias = (None, None) if projection is None else projection
        width = (x.shape[2] if weight is None else weight.shape[0]) // heads
        out = []
        for row in range(head * width, (head + 1) * width):
            if weight is None:
                out.append(x[b, t, row])
            else:
                out.append(sum(w * a for w, a in zip(weight[row], x[b, t])) + (0 if bias is None else bias[row]))
        return out

    def attended(head):
        keys = []
        for j in range(k.shape[1]):
            shown = options["mask"] is None or options["mask"][b, head, i, j]
            shown = shown and (options["key_mask"] is None or options["key_mask"][b, j])
            if shown and (j <= i or not options["is_causal"]):
                keys.append((features(k, j, attention.k, head), features(v, j, attention.v, head)))
        if attention.bias_k is not None:
            part = [len(bias) // heads for bias in (attention.bias_k, attention.bias_v)]
            cut = [slice(head * n, (head + 1) * n) for n in part]
            keys.append((list(attention.bias_k[cut[0]]), list(attention.bias_v[cut[1]])))
        query = features(q, i, attention.q, head)
        weights = [math.exp(sum(x * y for x, y in zip(query, key)) / math.sqrt(len(query))) for key, _ in keys]
        width = attention.out.weight.shape[1] // heads
        return [sum(w * x[c] for w, (_, x) in zip(weights, keys)) / (sum(weights) or 1) for c in range(width)]

    y = 0.0 if attention.out.bias is None else attention.out.bias[o]
    column = 0
    for head in range(heads):
        for value in attended(head):
            row = column if gate.shape[0] == attention.out.weight.shape[1] else head
            opening = sum(w * a for w, a in zip(gate[row], q[b, i])) + (0 if gate_bias is None else gate_bias[row])
            y += attention.out.weight[o, column] * value / (1 + math.exp(-opening))
            column += 1
    return y
