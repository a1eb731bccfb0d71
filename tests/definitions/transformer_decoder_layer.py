"""Vaswani et al. 2017, section 3.1: the decoder's three sub-layers, token by token, in lists of numbers."""

from tests.definitions.transformer_encoder_layer import ACTIVATION, affine, attention, normalised, total


def element(args, options, where, index):
    x, memory, params = args
    item, token, feature = index
    tokens, encoded = ([[float(number) for number in row] for row in array[item]] for array in (x, memory))
    mask, memory_mask, heads = options["key_mask"], options["memory_mask"], options["heads"]

    def seen(i, j):
        return (mask is None or mask[item, j]) and (j <= i or not options["is_causal"])

    def seen_of_memory(i, j):
        return memory_mask is None or memory_mask[item, j]

    def fed(rows):
        (w1, b1), (w2, b2) = params.feed_forward
        return [affine([ACTIVATION[options["activation"]](a) for a in affine(row, w1, b1)], w2, b2) for row in rows]

    for part, norm in (
        (lambda rows: attention(rows, rows, params.attention, heads, seen), params.norm1),
        (lambda rows: attention(rows, encoded, params.cross_attention, heads, seen_of_memory), params.norm2),
        (fed, params.norm3),
    ):
        if options["norm_first"]:
            tokens = total(tokens, part([normalised(row, norm, options["eps"]) for row in tokens]))
        else:
            tokens = [normalised(row, norm, options["eps"]) for row in total(tokens, part(tokens))]
    return tokens[token][feature]
