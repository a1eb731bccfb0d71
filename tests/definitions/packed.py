"""One query of sequence s, and the keys from cu_seqlens_k[s] to cu_seqlens_k[s + 1]."""

import math


def element(args, options, where, index):
    q, k, v, sinks = args
    head, row = (index[0], index[1]) if where == "lse" else (index[1], index[0])
    q_starts, k_starts = options["cu_seqlens_q"], options["cu_seqlens_k"]
    s = max(n for n in range(len(q_starts) - 1) if q_starts[n] <= row)
    queries, keys = q_starts[s + 1] - q_starts[s], k_starts[s + 1] - k_starts[s]
    shift = keys - queries if options["q_offset"] == "bottom_right" else 0
    heads = q.shape[1]
    of_keys, of_values = (head * shared.shape[1] // heads for shared in (k, v))
    y, lse = attend(
        list(q[row, head]),
        [list(k[k_starts[s] + j, of_keys]) for j in range(keys)],
        [list(v[k_starts[s] + j, of_values]) for j in range(keys)],
        row - q_starts[s] + shift,
        None if sinks is None else sinks[head],
        options,
    )
    return lse if where == "lse" else y[index[2]] if keys else 0.0


def attend(query, keys, values, position, sink, options):
    """(y, lse) of a query at `position` of keys 0, 1, ..., of which it sees what is_causal and window leave."""
    left, right = options["window"] or (None, None)
    total, sums = 0.0 if sink is None else math.exp(sink), [0.0 for _ in range(len(values[0]) if values else 0)]
    for j, (key, value) in enumerate(zip(keys, values)):
        early = left is not None and j < position - left
        late = (right is not None and j > position + right) or (options["is_causal"] and j > position)
        if early or late:
            continue
        score = sum(a * b for a, b in zip(query, key)) * (options["scale"] or 1 / math.sqrt(len(query)))
        if options["softcap"] is not None:
            score = options["softcap"] * math.tanh(score / options["softcap"])
        total += math.exp(score)
        sums = [s + math.exp(score) * x for s, x in zip(sums, value)]
    if total == 0:
        return sums, -math.inf
    return [s / total for s in sums], math.log(total)
