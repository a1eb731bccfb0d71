"""Ainslie et al. 2023, section 2, on top of Vaswani et al. 2017, section 3.2.2: one number of the output."""

import math


def element(args, options, where, index):
    q, k, v, params = args
    b, i, o = index
    heads, key_heads = options["heads"], options["key_heads"]

    def projected(x, t, projection, head, of_heads):
        """The features of one head, at token t."""
        weight, bias = projection
        width = weight.shape[0] // of_heads
        rows = range(head * width, head * width + width)
        sums = [sum(weight[r, f] * x[b, t, f] for f in range(x.shape[2])) for r in rows]
        return sums if bias is None else [s + bias[r] for s, r in zip(sums, rows)]

    joined = []
    for head in range(heads):
        shared = head * key_heads // heads
        query, top, bottom = projected(q, i, params.q, head, heads), [], 0.0
        for j in range(k.shape[1]):
            if options["mask"] is not None and not options["mask"][b, head, i, j]:
                continue
            if options["key_mask"] is not None and not options["key_mask"][b, j]:
                continue
            if options["is_causal"] and j > i:
                continue
            key = projected(k, j, params.k, shared, key_heads)
            weight = math.exp(sum(x * y for x, y in zip(query, key)) / math.sqrt(len(query)))
            top.append([weight * x for x in projected(v, j, params.v, shared, key_heads)])
            bottom += weight
        width = params.v.weight.shape[0] // key_heads
        joined += [sum(column) / bottom for column in zip(*top)] if top else [0.0] * width
    y = sum(w * x for w, x in zip(params.out.weight[o], joined))
    return y if params.out.bias is None else y + params.out.bias[o]
