"""Dai, Cai, Zhang, Xia and Zhang 2019, section 3: a gate from the root of the covariance of what the crop leaves."""

import math

from tests.definitions import covariance_pool, matrix_sqrt


def element(args, options, where, index):
    x, (w1, w2, b1, b2) = args
    n, c, *_ = index
    channels, height, width = x.shape[1:]
    rows, columns = crop(height, width, options["crop"] or height + width + 1)
    seen = (x[n : n + 1][:, :, rows][:, :, :, columns],)
    s = [[covariance_pool.element(seen, {}, "", (0, a, b)) for b in range(channels)] for a in range(channels)]
    root = matrix_sqrt.root(s, options["iterations"])
    v = [sum(row[k] for row in root) / channels for k in range(channels)]
    hidden = [max((0.0 if b1 is None else b1[r]) + sum(w * p for w, p in zip(w1[r], v)), 0.0) for r in range(len(w1))]
    u = (0.0 if b2 is None else b2[c]) + sum(w * p for w, p in zip(w2[c], hidden))
    return x[index] / (1 + math.exp(-u))


def crop(height, width, limit):
    """The rows and columns left, as lists: the four cases of the authors' code, where Python counts from the end."""
    rows, columns = list(range(height)), list(range(width))
    if height < limit and width < limit:
        return rows, columns
    if height < limit and width > limit:
        first = (width - limit) // 2
        return rows, columns[first : first + limit]
    if width < limit and height > limit:
        first = (height - limit) // 2
        return rows[first : first + limit], columns
    first_row, first_column = (height - limit) // 2, (width - limit) // 2
    return rows[first_row : first_row + limit], columns[first_column : first_column + limit]
