"""Wang et al. 2018, equations 1 to 6, with the pooling of their section 3.3 and the authors' options."""

import itertools
import math


def element(args, options, where, index):
    x, params = args
    channels, (n, c, *here) = x.shape[1], index
    mode, pool, stats = options["mode"], options["pool"], options.get("stats")
    places = list(itertools.product(*map(range, x.shape[2:])))
    time_is_kept = len(here) == 3
    cells = [[0] if time_is_kept and axis == 0 else [0, 1] for axis in range(len(here))]
    lattice = [s if len(cell) == 1 else s // 2 for s, cell in zip(x.shape[2:], cells)]

    def window(j):
        return [tuple(len(c) * a + b for a, b, c in zip(j, offset, cells)) for offset in itertools.product(*cells)]

    def linear_map(p, o, feature):
        if p is None:
            return feature(o)
        bias = 0 if p.bias is None else p.bias[o]
        return bias + sum(p.weight[o, d] * feature(d) for d in range(p.weight.shape[1]))

    def at_query(p, m, o, i):
        return linear_map(p, o, lambda d: x[(m, d, *i)])

    def at_key(p, m, o, j):
        if pool == "before":
            return linear_map(p, o, lambda d: max(x[(m, d, *i)] for i in window(j)))
        if pool == "after":
            return max(at_query(p, m, o, i) for i in window(j))
        return at_query(p, m, o, j)

    keys = places if pool is None else list(itertools.product(*map(range, lattice)))
    inner = channels if params.theta is None else params.theta.weight.shape[0]

    def pairwise(m, i, j):
        theta = [at_query(params.theta, m, k, i) for k in range(inner)]
        phi = [at_key(params.phi, m, k, j) for k in range(inner)]
        if mode == "concatenation":
            both = zip([*theta, *phi], [*params.concat[0], *params.concat[1]])
            return max(sum(f * w for f, w in both), 0.0)
        dot = sum(a * b for a, b in zip(theta, phi))
        return dot / math.sqrt(inner) if options["scale"] and mode != "dot_product" else dot

    def response(m, i):
        f = {j: pairwise(m, i, j) for j in keys}
        if mode in ("gaussian", "embedded_gaussian"):
            top = max(f.values())
            f = {j: math.exp(s - top) for j, s in f.items()}
            normaliser = sum(f.values())
        else:
            normaliser = len(keys)
        return lambda d: sum(f[j] * at_key(params.g, m, d, j) for j in keys) / normaliser

    def mapped(m, i):
        return linear_map(params.out, c, response(m, i))

    z = mapped(n, here)
    if params.norm is not None:
        if stats is None:
            values = [mapped(m, i) for m in range(x.shape[0]) for i in places]
            mean = sum(values) / len(values)
            var = sum((v - mean) ** 2 for v in values) / len(values)
        else:
            mean, var = stats.mean[c], stats.var[c]
        z = params.norm.gamma[c] * (z - mean) / math.sqrt(var + options["eps"]) + params.norm.beta[c]
    return x[index] + z
