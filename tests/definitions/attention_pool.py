"""Radford et al. 2021, section 2.4: multi-head QKV attention whose query is the average-pooled image, one number."""

import math


def element(args, options, where, index):
    x, ((wq, wk, wv, (w_out, b_out), _, _), position) = args
    n, o = index
    _, _, height, width = x.shape
    tokens = [[x[n, c, i, j] for c in range(x.shape[1])] for i in range(height) for j in range(width)]
    tokens.insert(0, [math.fsum(channel) / len(channel) for channel in zip(*tokens)])
    if position is not None:
        tokens = [[a + position[t, c] for c, a in enumerate(token)] for t, token in enumerate(tokens)]

    def projected(token, projection):
        weight, bias = projection
        made = [sum(w * a for w, a in zip(row, token)) for row in weight]
        return made if bias is None else [a + c for a, c in zip(made, bias)]

    query = projected(tokens[0], wq)
    keys, values = [projected(t, wk) for t in tokens], [projected(t, wv) for t in tokens]
    compared, passed = len(query) // options["heads"], len(values[0]) // options["heads"]
    y = 0.0 if b_out is None else b_out[o]
    for unit in range(len(values[0])):
        first = unit // passed * compared
        a = [
            math.exp(sum(query[d] * key[d] for d in range(first, first + compared)) / math.sqrt(compared))
            for key in keys
        ]
        y += w_out[o, unit] * sum(p * value[unit] for p, value in zip(a, values)) / sum(a)
    return y
