"""DeepSeek-V2, equations 37 to 47 of appendix C, with the norms of the latents of section 3.1.2: one output number."""

import cmath
import math


def times(weight, x, bias=None, rows=None):
    rows = range(weight.shape[0]) if rows is None else rows
    return [sum(w * a for w, a in zip(weight[r], x)) + (0 if bias is None else bias[r]) for r in rows]


def normed(x, gamma, eps):
    size = math.sqrt(math.fsum(a * a for a in x) / len(x) + eps)
    return [a / size * g for a, g in zip(x, gamma)]


def element(args, options, where, index):
    x, cos, sin, p = args
    b, i, o = index
    heads, pairs = options["heads"], cos.shape[2]
    per_query, per_key = p.q_up.shape[0] // heads, p.kv_up.shape[0] // heads
    plain = per_query - 2 * pairs

    def rope(features, t):
        """As complex numbers: the real part of conj(q) k is what a pair adds to a dot product."""
        halves = options["pairing"] == "half"
        two = [(f, f + pairs) if halves else (2 * f, 2 * f + 1) for f in range(pairs)]
        return [complex(features[m], features[n]) * complex(cos[b, t, f], sin[b, t, f]) for f, (m, n) in enumerate(two)]

    def latent_and_key(t):
        both = times(p.kv_down.weight, x[b, t], p.kv_down.bias)
        return normed(both[: p.kv_up.shape[1]], p.kv_norm.gamma, options["eps"]), rope(both[p.kv_up.shape[1] :], t)

    def of_query(t, h):
        z = list(x[b, t])
        if p.q_down is not None:
            z = normed(times(p.q_down.weight, z, p.q_down.bias), p.q_norm.gamma, options["eps"])
        made = times(p.q_up, z, rows=range(h * per_query, (h + 1) * per_query))
        return made[:plain], rope(made[plain:], t)

    joined = []
    for h in range(heads):
        straight, turned = of_query(i, h)
        weights, values = [], []
        for j in range(x.shape[1]):
            if (options["is_causal"] and j > i) or (options["mask"] is not None and not options["mask"][b, h, i, j]):
                continue
            latent, key = latent_and_key(j)
            made = times(p.kv_up, latent, rows=range(h * per_key, (h + 1) * per_key))
            score = sum(s * m for s, m in zip(straight, made))
            score += sum((q.conjugate() * k).real for q, k in zip(turned, key))
            weights.append(cmath.exp(score * (options["scale"] or per_query**-0.5)).real)
            values.append(made[plain:])
        total = sum(weights)
        joined += [sum(w * v[e] for w, v in zip(weights, values)) / (total or 1) for e in range(per_key - plain)]
    return times(p.out.weight, joined, p.out.bias, rows=[o])[0]
