"""One new query, of lists of keys and values: those that are kept, and those that are new."""

from tests.definitions.packed import attend


def element(args, options, where, index):
    q, k_new, v_new, past_k, past_v, sinks = args
    b, head, place, feature = index
    filled = past_k.shape[2] if options["cache_seqlens"] is None else options["cache_seqlens"][b]
    if where != "y":
        past, new = (past_k, k_new) if where == "present_k" else (past_v, v_new)
        after = place - filled
        return new[b, head, after, feature] if 0 <= after < new.shape[2] else past[index]
    lists = []
    for past, new in ((past_k, k_new), (past_v, v_new)):
        shared = head // (q.shape[1] // past.shape[1])
        lists.append([list(past[b, shared, j]) for j in range(filled)] + [list(token) for token in new[b, shared]])
    sink = None if sinks is None else sinks[head]
    return attend(list(q[b, head, place]), *lists, filled + place, sink, options)[0][feature]
