"""Luong, Pham and Manning 2015, equation 7 and the context vector of section 3.1."""

import math

from tests.definitions.alignment_score import energy


def element(args, options, where, index):
    query, memory, params = args
    n, t, last = index
    mask = options["mask"]
    states = {s: list(memory[n, s]) for s in range(memory.shape[1]) if mask is None or mask[n, s]}
    weights = alignment(list(query[n, t]), states, params, options["score"])
    return weights.get(last, 0.0) if where == "weights" else sum(weights[s] * states[s][last] for s in states)


def alignment(h, states, params, score):
    """The weight of every state in {s: state}."""
    return normalised({s: energy(h, m, params, score) for s, m in states.items()})


def normalised(energies):
    """Softmax of {s: energy}; beyond e^700 a term of the sum has long made its share 0."""
    return {s: 1 / sum(math.exp(min(other - e, 700)) for other in energies.values()) for s, e in energies.items()}
