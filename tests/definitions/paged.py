"""One query, of lists of keys and values that are read page by page until there are enough."""

from tests.definitions.packed import attend


def element(args, options, where, index):
    q, k_pages, v_pages, sinks = args
    b, head, i = index[:3]
    length = options["kv_seqlens"][b]
    lists = []
    for pages in (k_pages, v_pages):
        shared = head // (q.shape[1] // pages.shape[2])
        tokens = []
        for page in options["block_table"][b]:
            if len(tokens) < length:
                tokens += [list(token[shared]) for token in pages[page]]
        lists.append(tokens[:length])
    shift = {"bottom_right": length - q.shape[2], "top_left": 0}.get(options["q_offset"], options["q_offset"])
    y, lse = attend(list(q[b, head, i]), *lists, i + shift, None if sinks is None else sinks[head], options)
    return lse if where == "lse" else y[index[3]] if length else 0.0
