"""Zhang et al. 2020, section 3: K groups, each split R ways; equations of one group, with cardinality before radix."""

import math

import numpy as np

from tests.definitions.selective_kernel import block


def element(args, options, where, index):
    x, params = args
    n, c, i, j = index
    radix, stats, eps = options["radix"], options["stats"], options["eps"]
    hidden_per_group, per_group = params.fc2.weight.shape[1], params.fc1.weight.shape[1]
    groups = params.fc1.weight.shape[0] // hidden_per_group
    channels = groups * per_group
    geometry = {name: options[name] for name in ("stride", "padding", "dilation")} | {"groups": groups * radix}
    u = block(x, params.conv, params.norm0, stats and stats.norm0, eps, geometry)
    z = np.zeros((len(x), channels))
    for b, k in np.ndindex(*z.shape):
        z[b, k] = sum(sum(u[b, r * channels + k].flat) for r in range(radix)) / u[b, k].size
    h = block(z, params.fc1, params.norm1, stats and stats.norm1, eps, {"groups": groups})[n]
    group, place = divmod(c, per_group)
    seen = h[group * hidden_per_group : (group + 1) * hidden_per_group]
    logits = []
    for r in range(radix):
        row = (group * radix + r) * per_group + place
        logits.append(params.fc2.bias[row] + sum(w * value for w, value in zip(params.fc2.weight[row], seen)))
    if radix == 1:
        return u[n, c, i, j] / (1 + math.exp(-logits[0]))
    total = sum(math.exp(logit) for logit in logits)
    return sum(math.exp(logit) / total * u[n, r * channels + c, i, j] for r, logit in enumerate(logits))
