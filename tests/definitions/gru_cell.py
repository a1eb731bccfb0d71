"""Cho et al. 2014, equations 5 to 8, and the two ways to differ from them."""

import math


def element(args, options, where, index):
    x, h, params = args
    return step(list(x[index[0]]), list(h[index[0]]), params, options)[index[1]]


def step(x, h, params, options):
    """The new state of one item, as a list of floats."""
    w_x, w_h, b_x, b_h = params
    units = range(len(h))

    def from_input(gate, j):
        fed = x[gate * len(h) + j] if w_x is None else sum(w_x[gate, j, i] * x[i] for i in range(len(x)))
        return fed + (0.0 if b_x is None else b_x[gate, j])

    def from_state(gate, j, state):
        return sum(w_h[gate, j, k] * state[k] for k in units) + (0.0 if b_h is None else b_h[gate, j])

    def logistic(a):
        return 1 / (1 + math.exp(-a))

    reset = [logistic(from_input(0, j) + from_state(0, j, h)) for j in units]
    update = [logistic(from_input(1, j) + from_state(1, j, h)) for j in units]
    if options.get("reset_after", True):
        candidate = [math.tanh(from_input(2, j) + reset[j] * from_state(2, j, h)) for j in units]
    else:
        shown = [reset[k] * h[k] for k in units]
        candidate = [math.tanh(from_input(2, j) + from_state(2, j, shown)) for j in units]
    if options.get("z_weighs", "old") == "old":
        return [update[j] * h[j] + (1 - update[j]) * candidate[j] for j in units]
    return [(1 - update[j]) * h[j] + update[j] * candidate[j] for j in units]
