"""Vaswani et al. 2017, sections 3.1 to 3.3, and figure 1 of Xiong et al. 2020: token by token, in lists of numbers."""

import math


def element(args, options, where, index):
    x, params = args
    item, token, feature = index
    tokens = [[float(number) for number in row] for row in x[item]]
    attention_dropout, hidden_dropout, out_dropout = options["dropout"] or (None, None, None)

    def seen(i, j):
        return (options["key_mask"] is None or options["key_mask"][item, j]) and (j <= i or not options["is_causal"])

    def attended(rows):
        return dropped(attention(rows, rows, params.attention, options["heads"], seen), attention_dropout, item)

    def fed(rows):
        (w1, b1), (w2, b2) = params.feed_forward
        hidden = [[ACTIVATION[options["activation"]](a) for a in affine(row, w1, b1)] for row in rows]
        out = [affine(row, w2, b2) for row in dropped(hidden, hidden_dropout, item)]
        return dropped(out, out_dropout, item)

    for part, norm in ((attended, params.norm1), (fed, params.norm2)):
        if options["norm_first"]:
            tokens = total(tokens, part([normalised(row, norm, options["eps"]) for row in tokens]))
        else:
            tokens = [normalised(row, norm, options["eps"]) for row in total(tokens, part(tokens))]
    return tokens[token][feature]


def attention(rows, memory, params, heads, seen):
    """What every row makes of those rows of the memory that it may see."""
    q = [affine(row, *params.q) for row in rows]
    k, v = ([affine(row, *projection) for row in memory] for projection in (params.k, params.v))
    size = len(q[0]) // heads
    joined = [[] for _ in rows]
    for i in range(len(rows)):
        keys = [j for j in range(len(memory)) if seen(i, j)]
        for h in range(heads):
            units = range(h * size, (h + 1) * size)
            score = {j: sum(q[i][u] * k[j][u] for u in units) / size**0.5 for j in keys}
            e = {j: math.exp(score[j] - max(score.values())) for j in keys}
            joined[i] += [sum(e[j] * v[j][u] for j in keys) / sum(e.values()) if keys else 0.0 for u in units]
    return [affine(row, *params.out) for row in joined]


def normalised(row, params, eps):
    mean = math.fsum(row) / len(row)
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in row) / len(row) + eps)
    beta = [0.0] * len(row) if params.beta is None else params.beta
    return [gamma * (a - mean) / std + b for a, gamma, b in zip(row, params.gamma, beta)]


def affine(row, weight, bias):
    size = weight.shape[0]
    return [sum(weight[o, i] * a for i, a in enumerate(row)) + (0.0 if bias is None else bias[o]) for o in range(size)]


def dropped(rows, factors, item):
    if factors is None:
        return rows
    return [[a * factors[item, t, i] for i, a in enumerate(row)] for t, row in enumerate(rows)]


def total(one, other):
    return [[a + b for a, b in zip(*rows)] for rows in zip(one, other)]


ACTIVATION = {
    "relu": lambda a: a if a > 0 else 0.0,
    "gelu": lambda a: a * math.erfc(-a / math.sqrt(2)) / 2,
    "gelu_tanh": lambda a: a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2,
}
