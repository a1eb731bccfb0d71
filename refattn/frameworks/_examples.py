"""Calls for layers of frameworks that have fewer options than the reference."""

from refattn.attention.dot_product import multi_head
from refattn.core import Call, tree_map
from refattn.primitives import recurrent


def attention_layer(draw):
    """All four projections, biases for all or none, as many features inside as out, and a key for every query."""
    heads = draw.choice("heads", 1, 2, 3)
    features, b, queries, keys = heads * draw.size("E / heads"), draw.size("B"), draw.size("Q"), draw.size("K")
    f, g = draw.choice("F and G", (features, features), (draw.size("F"), draw.size("G")))
    bias = draw.choice("bias", True, False)
    params = multi_head.init(draw.rng, features, key_features=f, value_features=g, bias=bias)
    mask = draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None
    key_mask = draw.mask(b, keys) if draw.choice("padded", False, True) else None
    for some in (mask, key_mask):
        if some is not None:
            some[..., 0] = True
    options = {"heads": heads, "mask": mask, "key_mask": key_mask, "is_causal": draw.choice("is_causal", False, True)}
    shapes = (b, queries, features), (b, keys, f), (b, keys, g)
    return Call((*(draw.array(*shape) for shape in shapes), draw.like(params)), options)


def recurrent_layer(draw):
    """One layer, forward, of any cell as most frameworks have it, with or without a first state."""
    n, t, inputs, hidden = (draw.size(name, high=high) for name, high in (("N", 2), ("T", 3), ("I", 2), ("H", 2)))
    cell, bias = draw.choice("cell", "rnn", "gru", "lstm"), draw.choice("bias", True, False)
    params = draw.like(recurrent.init(draw.rng, inputs, hidden, cell=cell, bias=bias))
    state = recurrent.State(*(draw.array(n, 1, hidden) for _ in range(1 + (cell == "lstm"))))
    args = draw.array(n, t, inputs), draw.choice("state", state, None), params
    return Call(tree_map(lambda a: a / 8, args), {})  # a saturated gate hides mistakes


def bilinear_resize(draw):
    """Steps of a power of two: their positions are exact in float32, where most frameworks compute them."""
    align_corners, grows = draw.choice("align_corners", True, False), draw.choice("grows", True, False)
    few = [draw.size(axis) for axis in "HW"]
    factors = [draw.choice("factor", 1, 2, 4) for _ in few]
    many = [(n - 1) * f + 1 if align_corners else n * f for n, f in zip(few, factors)]
    before, after = (few, many) if grows else (many, few)
    x = draw.array(draw.size("N", high=2), draw.size("C", high=2), *before)
    return Call((x,), {"size": tuple(after), "align_corners": align_corners})
