"""Li et al. 2018: the coupled Newton-Schulz iteration, as nested lists."""

import math


def times(a, b):
    return [[sum(p * q for p, q in zip(row, column)) for column in zip(*b)] for row in a]


def three_minus(a):
    """(3 I - a) / 2"""
    return [[((3 if i == j else 0) - entry) / 2 for j, entry in enumerate(row)] for i, row in enumerate(a)]


def root(s, iterations):
    """The matrix after `iterations` steps, as a list of rows."""
    trace = sum(s[i][i] for i in range(len(s)))
    a = [[entry / trace for entry in row] for row in s]
    z = three_minus(a)
    y = times(a, z)
    for _ in range(iterations - 2):
        step = three_minus(times(z, y))
        y, z = times(y, step), times(step, z)
    y = times(y, three_minus(times(z, y)))
    return [[math.sqrt(trace) * entry for entry in row] for row in y]


def element(args, options, where, index):
    n, i, j = index
    return root(args[0][n].tolist(), options["iterations"])[i][j]
