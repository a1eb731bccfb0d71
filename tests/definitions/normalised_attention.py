"""The scores of one query, weights by the definition of the normaliser, and the weighted sum of one feature."""

import importlib

import numpy as np


def element(args, options, where, index):
    q, k, v = args
    *lead, i, e = index
    features, keys = q.shape[-1], k.shape[-2]
    scale = options["scale"] or features**-0.5
    scores, allowed = np.zeros(keys), np.ones(keys, bool)
    for j in range(keys):
        scores[j] = scale * sum(q[(*lead, i, d)] * k[(*lead, j, d)] for d in range(features))
        if options["mask"] is not None and not options["mask"][(*lead, i, j)]:
            allowed[j] = False
        if options["is_causal"] and j > i:
            allowed[j] = False
    weight = importlib.import_module(f"tests.definitions.{options['normaliser']}").element
    row = {"axis": 0, "mask": allowed, "noise": None, **(options["options"] or {})}
    return sum(float(weight((scores,), row, "", (j,))) * v[(*lead, j, e)] for j in range(keys))
