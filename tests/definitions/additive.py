"""Bahdanau, Cho and Bengio 2015, section 3.1: e = v' tanh(W s + U h), a softmax, and the expected annotation."""

import math


def element(args, options, where, index):
    query, memory, params = args
    n, t, last = index
    mask = options["mask"]
    allowed = [mask is None or bool(mask[n, j]) for j in range(memory.shape[1])]
    context, weights = attend(list(query[n, t]), [list(h) for h in memory[n]], params, allowed)
    return (context if where == "context" else weights)[last]


def attend(state, annotations, params, allowed):
    """The context and the weights of one decoder state, as lists of floats."""
    (w, b_w), (u, b_u), v, b, g = params
    length = math.sqrt(sum(component**2 for component in v))

    def score(h):
        total = 0.0 if b is None else float(b)
        for unit in range(len(v)):
            a = sum(w[unit, i] * state[i] for i in range(len(state))) + sum(u[unit, k] * h[k] for k in range(len(h)))
            a += sum(bias[unit] for bias in (b_w, b_u) if bias is not None)
            total += (v[unit] if g is None else float(g) * v[unit] / length) * math.tanh(a)
        return total

    powers = [math.exp(score(h)) if ok else 0.0 for h, ok in zip(annotations, allowed, strict=True)]
    weights = [power / sum(powers) if any(allowed) else 0.0 for power in powers]
    context = [sum(p * h[k] for p, h in zip(weights, annotations, strict=True)) for k in range(len(annotations[0]))]
    return context, weights
