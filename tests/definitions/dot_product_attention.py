"""Vaswani et al. 2017, equation 1, with what was added since, for one query and one feature of its value, or a key."""

import math
import sys


def element(args, options, where, index):
    q, k, v, _, sinks = args
    how, stage = options["convention"], options["return_scores"]
    b, h, i, *last = index
    keys = range(k.shape[2])
    takes_part = [visible(args, options, b, h, i, j) for j in keys]
    scores = [stages(args, options, takes_part[j], b, h, i, j) for j in keys]
    if where == "scores" and stage != "probs":
        return scores[last[0]][stage]

    logits = [s["logit"] for s in scores]
    candidates = logits if sinks is None else [*logits, sinks[h]]
    top = max(candidates, default=-math.inf)
    padding = options["q_seqlens"] is not None and i >= options["q_seqlens"][b]
    if top == -math.inf or padding:
        total, empty = 0.0, 0.0
        if not padding and (how.fully_masked == "nan" or (how.fully_masked == "zero_masked_only" and any(takes_part))):
            empty = math.nan
        probs = [empty for _ in keys]
    else:
        total = sum(math.exp(x - top) for x in candidates)
        probs = [math.exp(x - top) / total for x in logits]
    if how.fully_masked == "zero_probs":
        probs = [p if takes else 0.0 for p, takes in zip(probs, takes_part)]
    if where == "lse":
        return top + math.log(total) if total else -math.inf
    if where == "scores":
        return probs[last[0]]

    y = 0.0
    for j in keys:
        if how.masked_values == "skip" and not takes_part[j]:
            continue
        keep = options["dropout_keep"]
        kept = 1.0 if keep is None else keep[at(keep, b, h, i, j)] / (1 - options["dropout_p"])
        y += probs[j] * kept * v[b, head(h, q, v, how), j, last[0]]
    return y


def visible(args, options, b, h, i, j):
    """Whether key j takes part for query i."""
    q, k, *_ = args
    queries, keys = q.shape[2], k.shape[2]
    if options["q_seqlens"] is not None:
        queries, keys = options["q_seqlens"][b], options["kv_seqlens"][b]
    offset = options["convention"].q_offset if options["q_offset"] is None else options["q_offset"]
    if isinstance(offset, str):
        position = i + (keys - queries if offset == "bottom_right" else 0)
    else:
        position = i + (offset[b] if hasattr(offset, "shape") else offset)
    left, right = options["window"] or (None, None)
    mask, causal = options["attn_mask"], options["is_causal"]
    if mask is not None and not mask[at(mask, b, h, i, j)]:
        return False
    if (options["convention"].is_causal if causal is None else causal) and j > position:
        return False
    if left is not None and position - j > left:
        return False
    if right is not None and j - position > right:
        return False
    return j < keys


def stages(args, options, takes_part, b, h, i, j):
    """Everything that query i and key j make of each other before the softmax."""
    q, k, _, bias, _ = args
    how, softcap = options["convention"], options["softcap"]
    scale = how.scale if options["scale"] is None else options["scale"]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = head(h, q, k, how)
    seen = {"scaled": scale * sum(q[b, h, i, d] * k[b, group, j, d] for d in range(q.shape[3]))}
    x = seen["scaled"]
    if how.softcap_after == "scale":
        x = seen["softcapped"] = cap(x, softcap)
    if bias is not None:
        x = x + bias[at(bias, b, h, i, j)]
    if how.softcap_after == "bias":
        x = seen["softcapped"] = cap(x, softcap)
    if not takes_part:
        value = -sys.float_info.max if how.mask_value == "lowest" else how.mask_value
        x = value if how.mask_op == "replace" else x + value
    seen["biased"] = x
    if how.softcap_after == "mask":
        x = seen["softcapped"] = cap(x, softcap)
    return seen | {"logit": x}


def cap(x, softcap):
    return x if softcap is None else softcap * math.tanh(x / softcap)


def head(h, q, shared, how):
    """The head of keys or values that query head h uses."""
    groups, heads = shared.shape[1], q.shape[1]
    return h // (heads // groups) if how.gqa_order == "repeat_interleave" else h % groups


def at(x, *index):
    """The index into an array that is stretched to `index`."""
    return tuple(0 if n == 1 else i for n, i in zip(x.shape, index[len(index) - x.ndim :]))
