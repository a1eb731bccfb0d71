"""Rows that are hard for floating point, against 50 digits: the error is below what an analysis of the rounding allows.

A row of weights is made of logits l_j, off by at most h_j u, as follows (|q|.|k_j| is the sum of |q_d k_jd|, u the unit
roundoff, D the features; n terms summed in any order are off by n u of the sum of their sizes):

    the product                D + 3 times scale |q|.|k_j|      D terms; the scale: a root, a quotient, a product
    softcap tanh(x / softcap)  6 |softcap tanh(x / softcap)|    two quotients, twice that for tanh; what x was off by
                                                                shrinks by the largest slope near x
    the bias                   |l_j|                            one sum
    e^{l_j - top}              |l_j - top| + 2                  one difference, and an exponential good to 2 u

An error of top changes nothing, nor does anything else that all weights share. K weights are summed, and K products; a
weight of less than the smallest normal number may be lost, and then t_j is that number, else 0:

    |y - exact| <= max_j e^{h_j u} sum_j p_j (e^{h_j u} - 1) |v_j - y|  +  sum_j ((2 K + 4) u p_j + t_j) |v_j|
    |lse - exact| <= max_j h_j u + (K + 2) u + 2 u (|log z| + |lse|),   z the sum of e^{l_j - top}
"""

import mpmath
import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention, scaled_dot_product

mpmath_50 = mpmath.workdps(50)


def large_logits(rng):
    """Of about 1000 and -1000, close to each other: the softmax looks at differences of much smaller size."""
    q, k, v = rng.normal(size=(2, 32)), rng.normal(size=(40, 32)), rng.normal(size=(40, 4))
    k = q[0] * rng.choice([-1, 1], size=(40, 1)) * (1 + 1e-3 * rng.random((40, 1))) + 1e-3 * k
    return 14 * q, 14 * k, v


def many_keys(rng):
    return rng.normal(size=(1, 8)), rng.normal(size=(8192, 8)), rng.normal(size=(8192, 4))


def outlier_channel(rng):
    """One feature of queries and keys is 1000 times the others, one of the values a million times."""
    q, k, v = rng.normal(size=(2, 32)), rng.normal(size=(48, 32)), rng.normal(size=(48, 4))
    q[:, 5] *= 1000
    k[:, 5] = 1000 + k[:, 5] / 100  # the same for all keys, nearly
    v[:, 2] *= 1e6
    return q, k, v


def one_winner(rng):
    """One key takes it all but 1e-300 of it."""
    q, k, v = rng.normal(size=(2, 16)), rng.normal(size=(20, 16)), rng.normal(size=(20, 4))
    k[3] = q[0] * 690 / (q[0] @ q[0]) * 4
    v[3] = 0
    return q, k, v


ROWS = [large_logits, many_keys, outlier_channel, one_winner]


def exactly(q, k, v, u, softcap=None, bias=None, sink=None):
    """One query to 50 digits: y, lse, and what `allowed` wants."""
    with mpmath_50:
        scale = 1 / mpmath.sqrt(len(q))
        query, slack, logits = [mpmath.mpf(float(x)) for x in q], [], []
        for j, key in enumerate(k):
            x = scale * mpmath.fdot(query, [mpmath.mpf(float(b)) for b in key])
            h = (len(q) + 3) * scale * float(np.abs(q.astype(float)) @ np.abs(key.astype(float)))
            if softcap is not None:
                slope = mpmath.sech(max(abs(x) - h * u, 0) / softcap) ** 2
                x = softcap * mpmath.tanh(x / softcap)
                h = slope * h + 6 * abs(x)
            if bias is not None:
                x += mpmath.mpf(float(bias[j]))
                h += abs(x)
            logits.append(x)
            slack.append(h)
        terms = logits if sink is None else [*logits, mpmath.mpf(float(sink))]
        slack = slack if sink is None else [*slack, mpmath.mpf(0)]
        top = max(terms)
        slack = [h + top - x + 2 for h, x in zip(slack, terms)]
        weights = [mpmath.exp(x - top) for x in terms]
        z = mpmath.fsum(weights)
        p = [w / z for w in weights]
        values = [[mpmath.mpf(float(x)) for x in row] for row in v] + ([] if sink is None else [[0] * v.shape[1]])
        y = [mpmath.fsum(a * row[e] for a, row in zip(p, values)) for e in range(v.shape[1])]
        return y, top + mpmath.log(z), p, values, slack, mpmath.log(z)


def allowed(y, lse, p, values, slack, log_z, u, tiny):
    """How far floating point may be off: of every feature of y, and of lse."""
    with mpmath_50:
        grown = [mpmath.expm1(h * u) for h in slack]
        of_y = []
        for e, exact in enumerate(y):
            moved = mpmath.fsum(a * g * abs(row[e] - exact) for a, g, row in zip(p, grown, values))
            lost = [tiny if a < 2 * tiny else 0 for a in p]
            sizes = [(2 * len(p) + 4) * u * a + t for a, t in zip(p, lost)]
            summed = mpmath.fdot(sizes, [abs(row[e]) for row in values])
            of_y.append((1 + max(grown)) * moved + summed)
        return of_y, max(slack) * u + (len(p) + 2) * u + 2 * u * (abs(log_z) + abs(lse))


def ulps(error, exact, u):
    return float(error / (2 * u * abs(exact)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "softcap, bias and sinks"])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: rows.__name__)
def test_rows(rows, extra, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (x.astype(dtype) for x in rows(rng))
    options, bias, sinks = {"return_lse": True}, None, None
    if extra:
        bias, sinks = rng.normal(size=(len(q), len(k))).astype(dtype), rng.normal(size=1).astype(dtype)
        options["softcap"] = 50.0
    u, tiny = mpmath.mpf(float(np.finfo(dtype).eps)) / 2, mpmath.mpf(float(np.finfo(dtype).tiny))
    q4, k4, v4 = q[None, None], k[None, None], v[None, None]
    out, _ = dot_product_attention.forward(q4, k4, v4, bias, sinks, **options)
    found = {"dot_product_attention": out.y[0, 0]}
    if not extra:
        found["scaled_dot_product"] = scaled_dot_product.forward(q4, k4, v4)[0][0, 0]
    for i in range(len(q)):
        row = exactly(
            q[i],
            k,
            v,
            u,
            options.get("softcap"),
            None if bias is None else bias[i],
            None if sinks is None else sinks[0],
        )
        exact_y, exact_lse = row[:2]
        of_y, of_lse = allowed(*row, u, tiny)
        for name, y in found.items():
            errors = [abs(mpmath.mpf(float(a)) - b) for a, b in zip(y[i], exact_y)]
            worst = max(range(len(errors)), key=lambda e: errors[e] / of_y[e])
            words = [f"{ulps(x[worst], exact_y[worst], u):.3g} ulps" for x in (errors, of_y)]
            print(f"{name}, query {i}: off by {words[0]}, allowed are {words[1]}")
            assert errors[worst] <= of_y[worst], f"{name}: off by {words[0]}, allowed are {words[1]}"
        error = abs(mpmath.mpf(float(out.lse[0, 0, i])) - exact_lse)
        print(f"lse, query {i}: off by {ulps(error, exact_lse, u):.3g} ulps, allowed {ulps(of_lse, exact_lse, u):.3g}")
        assert error <= of_lse
