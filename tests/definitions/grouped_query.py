"""Ainslie et al. 2023, section 2.2: attention of query head h to the keys and values of its group, one number of it."""

import math


def element(args, options, where, index):
    q, k, v = args
    b, h, i, e = index
    heads, groups = q.shape[1], k.shape[1]
    members = {g: [] for g in range(groups)}  # which query heads share the head g
    for head in range(heads):
        deal = sorted(members, key=lambda g: len(members[g]))[0]  # as cards are dealt, round after round
        fill = next(g for g in members if len(members[g]) < heads // groups)  # one group full, then the next
        members[fill if options["order"] == "repeat_interleave" else deal].append(head)
    (g,) = (g for g in members if h in members[g])
    scale = options["scale"] or 1 / math.sqrt(q.shape[3])
    e_s = {}
    for j in range(k.shape[2]):
        hidden = options["mask"] is not None and not options["mask"][b, h, i, j]
        if not hidden and not (options["is_causal"] and i < j):
            e_s[j] = math.exp(scale * sum(q[b, h, i, d] * k[b, g, j, d] for d in range(q.shape[3])))
    return sum(w * v[b, g, j, e] for j, w in e_s.items()) / sum(e_s.values()) if e_s else 0.0
