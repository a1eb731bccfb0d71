"""Fu and others 2019, sections 3.1 and 3.4; the blocks have definitions of their own."""

import numpy as np

from tests.definitions import batch_norm, channel_self, conv, position


def element(args, options, where, index):
    x, params = args
    p = branch(x, params, options, "position", position)
    c = branch(x, params, options, "channel", channel_self)
    seen = {"both": p + c, "position": p, "channel": c}[where]
    if options["dropout"] is not None:
        seen = seen * getattr(options["dropout"], where)[:, :, None, None]
    n, o, i, j = index
    weight, bias = getattr(params, f"classify_{where}")
    return bias[o] + sum(weight[o, m, 0, 0] * seen[n, m, i, j] for m in range(seen.shape[1]))


def branch(x, params, options, name, attention):
    h = block(x, getattr(params, f"{name}_in"), options["stats"] and getattr(options["stats"], f"{name}_in"))
    h = every(attention, (h, getattr(params, name)), options, h.shape)
    return block(h, getattr(params, f"{name}_out"), options["stats"] and getattr(options["stats"], f"{name}_out"))


def block(x, params, stats):
    geometry = {"stride": 1, "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    shape = len(x), len(params.conv.weight), *x.shape[2:]
    a = every(conv, (x, params.conv), geometry, shape)
    u = every(batch_norm, (a, params.norm), {} if stats is None else {"stats": stats}, shape)
    return np.maximum(u, 0)


def every(definition, args, options, shape):
    """The array of all elements."""
    elements = [definition.element(args, options, "", index) for index in np.ndindex(*shape)]
    return np.reshape(elements, shape)
