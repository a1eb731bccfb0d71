r"""Bucketed relative position bias (T5).

A learned number per head is added to the score of a query and a key, looked up by how far apart they are: near
distances have one bucket each, far ones share buckets that grow like a logarithm.

Paper: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 2020
    (arXiv:1910.10683), section 2.1; the buckets are in the authors' code.

Shapes
    N buckets, H heads, Q queries, K keys.

Forward, to be added to the scores, with r = j - (i + offset), how far key j stands after query i
    bias_hij = table_nh                       n = bucket(-r) of the keys at or before the query, else bucket(0)
    and with both directions of N / 2 buckets:
    bias_hij = table_nh                       n = bucket(|r|) + (N / 2 where r > 0)

    bucket(d) of M buckets, of which E = floor(M / 2) are exact:
        d                                     where d < E
        E + floor((M - E) log(d / E) / log(max_distance / E)), but at most M - 1

Backward, with a bar for "gradient of the loss with respect to"
    tablebar_nh = sum over i, j in bucket n of biasbar_hij

Choices
    bidirectional=True as in encoders; False for decoders. The rounded logarithm is computed exactly, in whole
    numbers; in floating point a distance on the edge of a bucket may fall below it.
    T5 adds the bias to scores that are not scaled (scale = 1), and shares one table between all layers.
    offset is the number of keys that stand before the first query, as in decoding with a cache.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Ints, Shaped, expect, shaped


class Saved(NamedTuple):
    bucket: Shaped[Ints, "Q K"]
    buckets: int


@shaped
def forward(
    table: Shaped[Array, "N H"],
    *,
    queries: int,
    keys: int,
    offset: int = 0,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> tuple[Shaped[Array, "H Q K"], Saved]:
    _check(len(table), queries, keys, offset, bidirectional, max_distance)
    r = np.arange(keys) - (np.arange(queries)[:, None] + offset)
    if bidirectional:
        half = len(table) // 2
        bucket = _buckets(np.abs(r), half, max_distance) + np.where(r > 0, half, 0)
    else:
        bucket = _buckets(np.maximum(-r, 0), len(table), max_distance)
    return np.moveaxis(table[bucket], -1, 0), Saved(bucket, len(table))


@shaped
def backward(dbias: Shaped[Array, "H Q K"], saved: Saved) -> tuple[Shaped[Array, "N H"]]:
    dtable = np.zeros_like(dbias, order="C", shape=(saved.buckets, len(dbias)))
    np.add.at(dtable, saved.bucket, np.moveaxis(dbias, 0, -1))
    return (dtable,)


def _buckets(distance, buckets, max_distance):
    """The bucket of every distance (>= 0), of so many buckets.

    Bucket E + k begins where (d / E)^(M - E) >= (max_distance / E)^k: the logarithm without a logarithm.
    """
    exact = buckets // 2
    logarithmic = buckets - exact
    of, k = list(range(exact)), 0
    for d in range(exact, max_distance + 1):
        while k + 1 < logarithmic and d**logarithmic * exact ** (k + 1) >= max_distance ** (k + 1) * exact**logarithmic:
            k += 1
        of.append(exact + k)
    return np.array(of)[np.minimum(distance, max_distance)]


def _check(buckets, queries, keys, offset, bidirectional, max_distance):
    where = "t5_bias.forward:"
    sizes = queries, keys, offset
    whole = all(isinstance(size, (int, np.integer)) for size in sizes)
    expect(whole and min(queries, keys) >= 0, f"{where} queries, keys, offset", sizes, "ints, sizes >= 0")
    fits = buckets >= 4 and buckets % 2 == 0 if bidirectional else buckets >= 2
    expect(fits, f"{where} N of table", buckets, "an even number, 4 or more" if bidirectional else "2 or more")
    exact = buckets // 4 if bidirectional else buckets // 2
    expect(max_distance > exact, f"{where} max_distance", max_distance, f"more than {exact}, the exact buckets")


def example(draw):
    bidirectional = draw.choice("bidirectional", True, False)
    buckets = draw.choice("N", 4, 6, 8, 12) if bidirectional else draw.choice("N", 2, 3, 4, 5, 8)
    options = {
        "queries": draw.size("Q"),
        "keys": draw.size("K", high=6),
        "offset": draw.choice("offset", 0, 3, 9, -1),
        "bidirectional": bidirectional,
        "max_distance": draw.choice("max_distance", 8, 5, 16),
    }
    return Call((draw.array(buckets, draw.size("H", high=3)),), options)


ABOUT = About(witnesses=("framework", "definition", "relation"))
