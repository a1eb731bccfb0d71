"""Li, Wang, Hu and Yang 2019, section 3.1: split, fuse, select."""

import math

import numpy as np

from tests.definitions import batch_norm, conv


def element(args, options, where, index):
    x, (branches, squeeze, select) = args
    n, c, *_ = index
    count, (batch, inputs, *_), stats, eps = len(branches), x.shape, options["stats"], options["eps"]
    maps = []
    for m, (kernel, norm) in enumerate(branches):
        share = inputs // count
        seen = x[:, m * share : (m + 1) * share] if options["split_input"] else x
        dilation = options["dilations"][m]
        padding = dilation * (kernel.weight.shape[2] - 1) // 2
        geometry = {"stride": options["stride"], "padding": padding, "dilation": dilation, "groups": options["groups"]}
        maps.append(block(seen, kernel, norm, stats and stats.branches[m], eps, geometry))
    channels, pixels = maps[0].shape[1], maps[0][0, 0].size
    z = np.zeros((batch, channels))
    for b, k in np.ndindex(batch, channels):
        z[b, k] = sum(sum(u[b, k].flat) for u in maps) / pixels
    q = block(z, squeeze.conv, squeeze.norm, stats and stats.squeeze, eps)[n]
    scores = [sum(w * h for w, h in zip(select.weight[m * channels + c], q)) for m in range(count)]
    total = sum(math.exp(score) for score in scores)
    return sum(math.exp(score) / total * u[index] for score, u in zip(scores, maps))


def block(x, kernel, norm, stats, eps, geometry=None):
    """Convolution, batch normalisation if there is one, ReLU: entry by entry."""
    g = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | (geometry or {})
    reach = [g["dilation"] * (k - 1) + 1 for k in kernel.weight.shape[2:]]
    space = [(size + 2 * g["padding"] - r) // g["stride"] + 1 for size, r in zip(x.shape[2:], reach)]
    g |= {name: (g[name],) * len(space) for name in ("padding", "dilation")}
    a = everywhere((len(x), len(kernel.weight), *space), conv, (x, kernel), g)
    if norm is not None:
        a = everywhere(a.shape, batch_norm, (a, norm), {"eps": eps} | ({} if stats is None else {"stats": stats}))
    return np.array([max(value, 0.0) for value in a.flat]).reshape(a.shape)


def everywhere(shape, definition, args, options):
    whole = np.zeros(shape)
    for index in np.ndindex(*shape):
        whole[index] = definition.element(args, options, "", index)
    return whole
