"""Zhai et al. 2022, section 3.2: attention of learned queries, then y + MLP(LN(y)); one number of it, by mpmath."""

from mpmath import exp, mpf, pi, sqrt, tanh


def element(args, options, where, index):
    x, params = args
    b, latent, o = index
    attention, heads = params.attention, options["heads"]

    def projected(vector, projection):
        weight, bias = projection
        made = [sum((mpf(float(w)) * a for w, a in zip(row, vector)), mpf(0)) for row in weight]
        return made if bias is None else [a + float(c) for a, c in zip(made, bias)]

    shown = [t for t in range(x.shape[1]) if options["key_mask"] is None or options["key_mask"][b, t]]
    query = projected([float(a) for a in params.latents[latent]], attention.q)
    keys, values = ([projected([float(a) for a in x[b, t]], p) for t in shown] for p in (attention.k, attention.v))
    units = len(attention.v.weight)
    compared, passed = len(query) // heads, units // heads
    joined = []
    for unit in range(units):
        part = slice(unit // passed * compared, (unit // passed + 1) * compared)
        a = [exp(sum(s * t for s, t in zip(query[part], key[part])) / sqrt(compared)) for key in keys]
        joined.append(sum(p * value[unit] for p, value in zip(a, values)) / sum(a) if a else mpf(0))
    y = projected(joined, attention.out)
    if params.mlp is None:
        return float(y[o])
    mean = sum(y) / len(y)
    size = sqrt(sum((a - mean) ** 2 for a in y) / len(y) + options["eps"])
    normed = [(a - mean) / size for a in y]
    if params.norm is not None:
        normed = [a * float(g) + float(c) for a, g, c in zip(normed, *params.norm)]
    hidden = projected(normed, params.mlp.linear1)
    if options["activation"] == "relu":
        hidden = [max(a, mpf(0)) for a in hidden]
    else:
        hidden = [a / 2 * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 * a**3))) for a in hidden]
    return float(y[o] + projected(hidden, params.mlp.linear2)[o])
