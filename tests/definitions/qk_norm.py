"""Henry et al. 2020, equation 4, with the norms of Dehghani et al. 2023 and Zhang 2019: one number of the output."""

import math


def element(args, options, where, index):
    q, k, v, params, rotary = args
    b, h, i, e = index
    features, eps = q.shape[3], options["eps"]

    def normed(x, norm):
        mean = sum(x) / features if options["norm"] == "layer" else 0.0
        square = sum((a - mean) ** 2 for a in x)
        size = math.sqrt(square + features * eps)
        if options["norm"] != "l2":
            size /= math.sqrt(features)
        out = [(a - mean) / size for a in x]
        if norm is not None:
            out = [a * g for a, g in zip(out, norm.gamma)]
            if norm.beta is not None:
                out = [a + c for a, c in zip(out, norm.beta)]
        return out

    def turned(x, cos, sin):
        out = list(x)
        for f, (c, s) in enumerate(zip(cos, sin)):
            m, n = (f, f + len(cos)) if options["pairing"] == "half" else (2 * f, 2 * f + 1)
            out[m], out[n] = c * x[m] - s * x[n], s * x[m] + c * x[n]
        return out

    def ready(x, norm, tables):
        if rotary is None:
            return normed(x, norm)
        if options["order"] == "rotary_first":
            return normed(turned(x, *tables), norm)
        return turned(normed(x, norm), *tables)

    def tables(t, of_keys):
        return None if rotary is None else [table[b, t] for table in rotary[2 * of_keys : 2 * of_keys + 2]]

    factor = options["scale"] or (1.0 if options["norm"] == "l2" else features**-0.5)
    if params.logit_scale is not None:
        factor *= params.logit_scale[h]
    query, top, bottom = ready(q[b, h, i], params.q, tables(i, False)), 0.0, 0.0
    for j in range(k.shape[2]):
        if (options["is_causal"] and j > i) or (options["mask"] is not None and not options["mask"][b, h, i, j]):
            continue
        key = ready(k[b, h, j], params.k, tables(j, True))
        weight = math.exp(factor * sum(x * y for x, y in zip(query, key)))
        top, bottom = top + weight * v[b, h, j, e], bottom + weight
    return top / bottom if bottom else 0.0
