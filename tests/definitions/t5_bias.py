"""Raffel et al. 2020: the bucket of one query and key, with a logarithm of 50 digits."""

import mpmath


def bucket(distance, buckets, max_distance):
    exact = buckets // 2
    if distance < exact:
        return distance
    with mpmath.workdps(50):
        share = mpmath.log(mpmath.mpf(distance) / exact) / mpmath.log(mpmath.mpf(max_distance) / exact)
        step = int(mpmath.floor(share * (buckets - exact) + mpmath.mpf(10) ** -30))  # on an edge, to its right
    return min(exact + step, buckets - 1)


def element(args, options, where, index):
    (table,) = args
    h, i, j = index
    after, buckets = j - i - options["offset"], len(table)
    if options["bidirectional"]:
        n = bucket(abs(after), buckets // 2, options["max_distance"])
        n += buckets // 2 if after > 0 else 0
    else:
        n = bucket(max(-after, 0), buckets, options["max_distance"])
    return table[n, h]
