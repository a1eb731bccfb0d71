"""Luong, Pham and Manning 2015, section 3.1; the scores of the PyTorch, TensorFlow and MATLAB codes."""

import math


def element(args, options, where, index):
    query, memory, params = args
    n, t, s = index
    return energy(list(query[n, t]), list(memory[n, s]), params, options["score"])


def energy(h, m, params, score):
    """The score of one decoder state and one encoder state, as lists."""
    w, b, v, g = params
    g = 1.0 if g is None else float(g)
    if score == "dot":
        return g * sum(x * y for x, y in zip(h, m, strict=True))
    rows = range(len(w))
    b = [0.0] * len(w) if b is None else list(b)
    if score == "general":
        return g * sum(h[i] * (b[i] + sum(w[i, j] * m[j] for j in range(len(m)))) for i in rows)
    x, rest = (h + m, [0.0] * len(w)) if score == "concat" else (h, m)
    return g * sum(v[i] * math.tanh(sum(w[i, j] * x[j] for j in range(len(x))) + b[i] + rest[i]) for i in rows)
