"""ONNX's operators as models of one node, called as the reference's forward is.

    y = softmax(load, s, axis=-1)

Whoever runs models gives load(model) -> a function of {name: array} that returns the list of outputs. Arrays are
NumPy's. Attributes of ONNX have the precision of float32: in float64 a number that it does not hold is NotHandled.
"""

import functools
import inspect
import math

import numpy as np
from onnx import helper

from refattn.attention.dot_product.dot_product_attention import STAGES
from refattn.core import Call
from refattn.oracle.contract import NotHandled
from refattn.primitives import batch_norm as batch_norm_reference
from refattn.primitives import gru_cell, lstm_cell

CONTRIB = "com.microsoft"


def node(load, op, inputs, outputs=("y",), *, opset, domain="", **attributes):
    """The outputs of a model of one node, a list. `inputs` are {name: array}, in order; None is left out.

    An output named "" is not asked for. An attribute that is None has the operator's default.
    """
    given = {name: np.ascontiguousarray(x) for name, x in inputs.items() if x is not None}
    names = [name if name in given else "" for name in inputs]
    while not names[-1]:
        names.pop()
    kinds = tuple((name, x.dtype.name, _known(x)) for name, x in given.items())
    said = tuple((name, x) for name, x in attributes.items() if x is not None)
    return _runner(load, op, tuple(names), kinds, tuple(outputs), opset, domain, said)(given)


@functools.lru_cache(1024)
def _runner(load, op, names, kinds, outputs, opset, domain, attributes):
    types = {name: helper.np_dtype_to_tensor_dtype(_dtype(kind)) for name, kind, _ in kinds}
    infos = [helper.make_tensor_value_info(name, types[name], shape) for name, _, shape in kinds]
    results = [helper.make_tensor_value_info(name, types[kinds[0][0]], None) for name in outputs if name]
    one = helper.make_node(op, names, outputs, domain=domain, **dict(attributes))
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([one], op, infos, results)
    return load(helper.make_model(graph, opset_imports=imports, ir_version=10))


def _known(x):
    """What a model says of a shape: how many axes; of whole numbers all, since they may be axes and sizes."""
    return x.shape if x.dtype.kind == "i" else (None,) * x.ndim


def _dtype(name):
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def candidate(load, function, refuse=None, **fixed):
    """A function below, run by `load`, after `refuse` has seen the call."""
    bound = functools.partial(function, load, **fixed)
    if refuse is None:
        return bound

    def guarded(*args, **options):
        refuse(*args, **options)
        return bound(*args, **options)

    guarded.__name__, guarded.__signature__ = function.__name__, inspect.signature(bound)
    return guarded


def attribute(x, like, what):
    """x, if float32 holds it or the arrays are no wider."""
    if x is not None and like.dtype == np.float64 and float(np.float32(x)) != x:
        raise NotHandled(f"{what} that float32 does not hold, in float64")
    return x


def heads_last(x):
    """(B, H, T, D) as (B, T, H D)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def heads_first(x, heads):
    """(B, T, H D) as (B, H, T, D)."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


# --- Attention ------------------------------------------------------------------------------------------------


def attention_23(
    load, q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, q_offset=None, scale=None, softcap=None,
    packed=False,
):  # fmt: skip
    """Where queries are further on, the first keys are the past."""
    split = past(q, k, v, q_offset if is_causal else None)
    options = {"is_causal": is_causal, "scale": scale, "softcap": softcap}
    return _attention(load, 23, q, k, v, _one_mask(q, k, attn_bias, attn_mask), split, packed=packed, **options)


def attention_25(
    load, q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, q_offset=None, window=None, scale=None,
    softcap=None,
):  # fmt: skip
    split = past(q, k, v, q_offset if is_causal or window is not None else None)
    options = {"is_causal": is_causal, "scale": scale, "softcap": softcap, "window": window}
    return _attention(load, 25, q, k, v, _one_mask(q, k, attn_bias, attn_mask), split, **options)


def attention_of_cache(
    load, q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, kv_seqlens=None, scale=None, softcap=None
):
    """With nonpad_kv_seqlen: keys and values are a cache of which so many are there, the queries are the last ones."""
    filled = np.full(len(q), k.shape[2]) if kv_seqlens is None else kv_seqlens
    options = {"is_causal": is_causal, "scale": scale, "softcap": softcap}
    mask = _one_mask(q, k, attn_bias, attn_mask)
    return _attention(load, 24, q, k, v, mask, filled=filled.astype(np.int64), **options)


def attention_scores(
    load, q, k, v, attn_bias=None, *, return_scores, attn_mask=None, is_causal=False, scale=None, softcap=None
):
    """With qk_matmul_output: (Y, None, scores)."""
    options = {"is_causal": is_causal, "scale": scale, "softcap": softcap}
    mask = _one_mask(q, k, attn_bias, attn_mask)
    return _attention(load, 23, q, k, v, mask, mode=STAGES.index(return_scores), **options)


def scores_example(draw):
    b, heads, times = draw.size("B", high=2), draw.size("G", high=2), draw.size("H / G", high=2)
    queries, keys, features = draw.size("Q", high=6), draw.size("K", high=6), draw.size("D", high=5)
    shapes = (b, heads * times, queries, features), (b, heads, keys, features), (b, heads, keys, draw.size("E", high=4))
    options = {
        "return_scores": draw.choice("return_scores", *STAGES),
        "attn_mask": draw.mask(b, 1, queries, keys) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "softcap": draw.choice("softcap", None, 2.0),
        "scale": draw.choice("scale", None, 0.25),
    }
    bias = draw.array(queries, keys) if draw.choice("biased", False, True) else None
    return Call((*(draw.array(*shape) for shape in shapes), bias), options)


def attention_present(load, q, k, v, past_k, past_v, *, scale=None, is_causal=True, window=None, softcap=None):
    """With a past, as `cached`: (Y, present_key, present_value)."""
    inputs = {"q": q, "k": k, "v": v, "mask": None, "past_k": past_k, "past_v": past_v}
    names = "y", "present_k", "present_v"
    return tuple(
        node(load, "Attention", inputs, names, opset=25, **_settled(q, k, v, is_causal, scale, softcap, window))
    )


def past(q, k, v, offset):
    """(past_key, past_value) of as many keys as the queries are further on."""
    if offset is None:
        return None, None
    n = np.unique(k.shape[2] - q.shape[2] if isinstance(offset, str) else offset)
    if len(n) > 1:
        raise NotHandled("a past of several lengths")
    if not 0 <= n[0] < k.shape[2]:
        raise NotHandled("queries that begin before the first key, or behind the last")
    return (k[:, :, : n[0]], v[:, :, : n[0]]) if n[0] else (None, None)


def _one_mask(q, k, bias, mask):
    """ONNX has one input for both; its last two axes are not stretched."""
    if bias is not None and mask is not None:
        bias = np.where(mask, bias, np.array(-np.inf, q.dtype))
    one = mask if bias is None else bias
    return None if one is None else np.broadcast_to(one, (*one.shape[:-2], q.shape[2], k.shape[2]))


def _settled(q, k, v, is_causal, scale, softcap, window=None):
    """The attributes."""
    if k.shape[1] != v.shape[1]:
        raise NotHandled("keys and values with different numbers of heads")
    if scale is not None and not scale > 0:
        raise NotHandled("a scale of 0 or less: the operator takes its square root")
    said = {"is_causal": int(is_causal), "scale": attribute(scale, q, "a scale"), "softcap": softcap}
    if window is not None:
        said |= dict(zip(("left_window_size", "right_window_size"), (-1 if n is None else n for n in window)))
    return said


def _attention(load, opset, q, k, v, mask, split=(None, None), *, packed=False, mode=None, filled=None, **options):
    said, (past_k, past_v) = _settled(q, k, v, **options), split
    if past_k is not None:
        k, v = k[:, :, past_k.shape[2] :], v[:, :, past_v.shape[2] :]
    heads = q.shape[1]
    if packed:
        said |= {"q_num_heads": heads, "kv_num_heads": k.shape[1]}
        q, k, v = heads_last(q), heads_last(k), heads_last(v)
    inputs = {"q": q, "k": k, "v": v, "mask": mask, "past_k": past_k, "past_v": past_v, "filled": filled}
    outputs = ("y", "", "", "scores") if mode is not None else ("y", "present_k", "present_v")
    if past_k is None and mode is None:
        outputs = ("y",)
    y, *rest = node(load, "Attention", inputs, outputs, opset=opset, qk_matmul_output_mode=mode, **said)
    y = heads_first(y, heads) if packed else y
    return y if mode is None else (y, None, rest[0])


# --- com.microsoft: what only ONNX Runtime has ----------------------------------------------------------------


def multi_head(
    load, q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, q_offset=None, kv_seqlens=None, scale=None
):
    """MultiHeadAttention; what is masked is a bias of -inf, padding is that of key_padding_mask."""
    heads = q.shape[1]
    if not heads == k.shape[1] == v.shape[1]:
        raise NotHandled("heads that share keys or values")
    past_k, past_v = past(q, k, v, q_offset if is_causal else None)
    if past_k is not None and q.shape[3] != v.shape[3]:
        raise NotHandled("a past of values of another width")
    bias = _attention_bias(q, k, attn_bias, attn_mask)
    padding = None if kv_seqlens is None else (np.arange(k.shape[2]) < kv_seqlens[:, None]).astype(np.int32)
    if past_k is not None:
        k, v = k[:, :, past_k.shape[2] :], v[:, :, past_v.shape[2] :]
    inputs = {"q": heads_last(q), "k": heads_last(k), "v": heads_last(v), "bias": None, "padding": padding}
    inputs |= {"attention_bias": bias, "past_k": past_k, "past_v": past_v}
    outputs = ("y",) if past_k is None else ("y", "present_k", "present_v")
    said = {"num_heads": heads, "scale": scale, "unidirectional": int(is_causal)}
    said |= {} if padding is None else {"mask_filter_value": -math.inf}
    y = node(load, "MultiHeadAttention", inputs, outputs, opset=21, domain=CONTRIB, **said)[0]
    return heads_first(y, heads)


def _attention_bias(q, k, bias, mask):
    """(1 or B, 1 or H, Q, K); what is masked is -inf."""
    if bias is None and mask is None:
        return None
    bias = np.zeros(1, q.dtype) if bias is None else bias
    bias = bias if mask is None else np.where(mask, bias, np.array(-np.inf, q.dtype))
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    return np.broadcast_to(bias, (*bias.shape[:2], q.shape[2], k.shape[2]))


def grouped_query(
    load, q, k, v, attn_bias=None, sinks=None, *, attn_mask=None, kv_seqlens=None, window=None, scale=None,
    softcap=None,
):  # fmt: skip
    """GroupQueryAttention, always causal, the last query at the last key that is there.

    Queries of all keys are a prompt. Fewer are new ones, after a past; more than one of them has to be of one item.
    """
    (batch, heads, queries, features), keys = q.shape, k.shape[2]
    filled = np.full(batch, keys) if kv_seqlens is None else kv_seqlens
    if k.shape[1] != v.shape[1] or v.shape[3] != features:
        raise NotHandled("values of other heads, or of another width")
    if features % 8:
        raise NotHandled("a number of features that is no multiple of 8")
    if (filled < queries).any():
        raise NotHandled("more queries than keys")
    left, right = window or (None, None)
    if right not in (None, 0):
        raise NotHandled("a window to the right, which causal hides")
    said = {"num_heads": heads, "kv_num_heads": k.shape[1], "scale": scale, "softcap": softcap}
    said |= {"local_window_size": None if left is None else left + 1}
    bias = _attention_bias(q, k, attn_bias, attn_mask)

    def some(items):
        mine, there = slice(items[0], items[-1] + 1), filled[items]
        new = [slice(n - queries, n) for n in there]
        inputs = {"q": heads_last(q[mine])}
        for name, x in (("k", k), ("v", v)):
            inputs[name] = heads_last(np.stack([x[b, :, at] for b, at in zip(items, new)]))
        cache = (None, None) if queries == keys else (k[mine, :, : keys - 1], v[mine, :, : keys - 1])
        if queries > 1 and queries < keys:
            cache = tuple(x[:, :, : keys - queries] for x in (k[mine], v[mine]))
        inputs |= {"past_k": cache[0], "past_v": cache[1], "seqlens": (there - 1).astype(np.int32)}
        inputs |= {"total": np.array([keys], np.int32), "cos": None, "sin": None, "positions": None}
        one = bias is not None and bias.shape[0] > 1
        inputs |= {"bias": bias[mine] if one else bias, "sinks": sinks}
        outputs = "y", "present_k", "present_v"
        return node(load, "GroupQueryAttention", inputs, outputs, opset=21, domain=CONTRIB, **said)[0]

    together = queries in (1, keys)
    items = [list(range(batch))] if together else [[b] for b in range(batch)]
    return heads_first(np.concatenate([some(i) for i in items]), heads)


def self_attention(load, x, params, heads, mask, key_mask, is_causal):
    """Attention, of `multi_head` with one sequence for all and no last projection."""
    pairs = params.q, params.k, params.v
    weight = np.concatenate([p.weight.T for p in pairs], axis=1)
    bias = None if params.q.bias is None else np.concatenate([p.bias for p in pairs])
    inputs = {"x": x, "weight": weight, "bias": bias, "padding": None, "past": None, "attention_bias": None}
    said = {
        "num_heads": heads,
        "unidirectional": int(is_causal),
        "qkv_hidden_sizes": tuple(len(p.weight) for p in pairs),
    }
    if mask is not None:
        inputs["attention_bias"] = np.where(mask, x.dtype.type(0), x.dtype.type(-np.inf))
    if key_mask is not None:
        inputs["padding"], said["mask_filter_value"] = key_mask.astype(np.int32), -math.inf
    return node(load, "Attention", inputs, opset=21, domain=CONTRIB, **said)[0]


# --- rotary embeddings ----------------------------------------------------------------------------------------


def rotary(load, x, cos, sin, *, pairing, positions=False, contrib=False):
    """cos and sin of every token; or, by position_ids, rows of one table."""
    if pairing == "interleaved_to_half":
        raise NotHandled("a pairing that writes another order than it reads")
    if x.shape[-1] % 2:
        raise NotHandled("an odd number of features")
    ids = None
    if positions or contrib:
        ids = np.arange(cos[..., 0].size).reshape(cos.shape[:2])
        cos, sin = (table.reshape(-1, table.shape[-1]) for table in (cos, sin))
    partial = 2 * cos.shape[-1] < x.shape[-1]
    said = {"interleaved": int(pairing == "interleaved"), "num_heads": 1 if x.ndim == 3 else None}
    said |= {"rotary_embedding_dim": 2 * cos.shape[-1] if partial else None}
    if not contrib:
        return node(load, "RotaryEmbedding", {"x": x, "cos": cos, "sin": sin, "ids": ids}, opset=23, **said)[0]
    said |= {"num_heads": 1 if x.ndim == 3 else x.shape[1]}
    inputs = {"x": x, "ids": ids, "cos": cos, "sin": sin}
    return node(load, "RotaryEmbedding", inputs, opset=21, domain=CONTRIB, **said)[0]


# --- normalisation, softmax -----------------------------------------------------------------------------------


def layer_norm(load, x, params=None, *, axes, eps):
    scale, bias = params or (np.ones(x.shape[-axes:], x.dtype), None)
    eps = attribute(eps, x, "an epsilon")
    return node(load, "LayerNormalization", {"x": x, "scale": scale, "bias": bias}, opset=17, axis=-axes, epsilon=eps)[
        0
    ]


def rms_norm(load, x, params=None, *, eps):
    scale = np.ones(x.shape[-1:], x.dtype) if params is None else params.gamma
    return node(load, "RMSNormalization", {"x": x, "scale": scale}, opset=23, epsilon=attribute(eps, x, "an epsilon"))[
        0
    ]


def group_norm(load, x, params=None, *, groups, eps):
    if x.ndim < 3:
        raise NotHandled("no axes behind the channels")
    scale, bias = params or (np.ones(x.shape[1], x.dtype), np.zeros(x.shape[1], x.dtype))
    inputs = {"x": x, "scale": scale, "bias": bias}
    eps = attribute(eps, x, "an epsilon")
    stash = helper.np_dtype_to_tensor_dtype(x.dtype) if x.dtype == np.float64 else None  # unless told it is float32
    said = {"num_groups": groups, "epsilon": eps, "stash_type": stash}
    return node(load, "GroupNormalization", inputs, opset=21, **said)[0]


def batch_norm(load, x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        return batch_norm_train(load, x, params, eps=eps)
    return batch_norm_eval(load, x, params, stats=stats, eps=eps)


def batch_norm_example(draw):
    """With an epsilon that float32 holds."""
    call = batch_norm_reference.example(draw)
    return call._replace(options=call.options | {"eps": 2.0**-10})


def batch_norm_train(load, x, params=None, *, eps=1e-5):
    mean, var = (a.astype(x.dtype) for a in batch_norm_reference.init_stats(x.shape[1]))
    names = "y", "running_mean", "running_var"
    return _batch_norm(load, x, params, mean, var, eps, names, training_mode=1)


def batch_norm_eval(load, x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        raise NotHandled("training")
    return _batch_norm(load, x, params, *stats, eps, ("y",))


def _batch_norm(load, x, params, mean, var, eps, names, **said):
    scale, bias = params or (np.ones(x.shape[1], x.dtype), np.zeros(x.shape[1], x.dtype))
    inputs = {"x": x, "scale": scale, "bias": bias, "mean": mean, "var": var}
    eps = attribute(eps, x, "an epsilon")
    return node(load, "BatchNormalization", inputs, names, opset=15, epsilon=eps, **said)[0]


def softmax(load, s, *, axis):
    return node(load, "Softmax", {"s": s}, opset=13, axis=axis)[0]


def log_softmax(load, s, *, axis):
    return node(load, "LogSoftmax", {"s": s}, opset=13, axis=axis)[0]


def logsumexp(load, s, *, axis, keepdims):
    inputs = {"s": s, "axes": np.array([axis])}
    return node(load, "ReduceLogSumExp", inputs, opset=18, keepdims=int(keepdims))[0]


# --- linear maps, convolution, pooling, resizing --------------------------------------------------------------


def gemm(load, x, params):
    rows = x.reshape(-1, x.shape[-1])
    y = node(load, "Gemm", {"x": rows, "weight": params.weight, "bias": params.bias}, opset=13, transB=1)[0]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matmul(load, x, params):
    if params.bias is not None:
        raise NotHandled("a bias")
    return node(load, "MatMul", {"x": x, "weight": params.weight.T}, opset=13)[0]


def conv(load, x, params, *, stride, padding, dilation, groups):
    said = _windows(x, params.weight.shape[2:], stride, padding, dilation)
    inputs = {"x": x, "weight": params.weight, "bias": params.bias}
    return node(load, "Conv", inputs, opset=22, group=groups, **said)[0]


def max_pool(load, x, *, kernel, stride, padding, dilation):
    said = _windows(x, kernel, stride, padding, dilation)
    return node(load, "MaxPool", {"x": x}, opset=22, **said)[0]


def average_pool(load, x, *, kernel, stride, padding, count_include_pad):
    said = _windows(x, kernel, stride, padding)
    return node(load, "AveragePool", {"x": x}, opset=22, count_include_pad=int(count_include_pad), **said)[0]


def _windows(x, kernel, stride, padding, dilation=None):
    """By ONNX's names, one number for each axis."""
    stride = kernel if stride is None else stride
    said = {"kernel_shape": kernel, "strides": stride, "pads": padding, "dilations": dilation}
    said = {name: (n,) * (x.ndim - 2) if isinstance(n, int) else n for name, n in said.items()}
    return said | {"pads": said["pads"] * 2}


def bilinear_resize(load, x, *, size, align_corners):
    size = (size, size) if isinstance(size, int) else size
    inputs = {"x": x, "roi": None, "scales": None, "sizes": np.array([*x.shape[:2], *size])}
    mode = "align_corners" if align_corners else "half_pixel"
    return node(load, "Resize", inputs, opset=19, mode="linear", coordinate_transformation_mode=mode)[0]


# --- recurrent layers -----------------------------------------------------------------------------------------

GATES = {  # operator, and which of our gates are its gates
    lstm_cell.Params: ("LSTM", (0, 3, 1, 2)),
    gru_cell.Params: ("GRU", (1, 0, 2)),
}
DIRECTIONS = {"forward": "forward", "backward": "reverse", "both": "bidirectional"}


def recurrent(load, x, state, params, *, direction, mask=None, reset_after=True):
    """One layer; a mask is one of lengths, or not handled."""
    cells, ways = params.cells, 2 if direction == "both" else 1
    if len(cells) > ways:
        raise NotHandled("several layers: a node is one")
    lengths = None
    if mask is not None:
        lengths = mask.sum(axis=1).astype(np.int32)
        if (mask != (np.arange(x.shape[1]) < lengths[:, None])).any():
            raise NotHandled("a mask that is not one of lengths")
        if not lengths.all():
            raise NotHandled("a sequence of no steps, whose last state ONNX does not define")
    op, order = GATES.get(type(cells[0]), ("RNN", None))
    hidden = cells[0].w_h.shape[-1]
    h, c = (None, None) if state is None else (None if s is None else s.swapaxes(0, 1) for s in state)
    inputs = {"x": x.swapaxes(0, 1)}
    inputs |= {name: np.stack([_gates(w, order) for w in ws]) for name, ws in
               (("w", [cell.w_x for cell in cells]), ("r", [cell.w_h for cell in cells]))}  # fmt: skip
    inputs |= {"b": _biases(cells, order, hidden, x.dtype), "lengths": lengths, "h": h}
    inputs |= {"c": c} if op == "LSTM" else {}
    said = {"hidden_size": hidden, "direction": DIRECTIONS[direction]}
    said |= {"linear_before_reset": int(reset_after)} if op == "GRU" else {}
    names = ("y", "h_final", "c_final") if op == "LSTM" else ("y", "h_final")
    y, *final = node(load, op, inputs, names, opset=14, **said)
    y = y.transpose(2, 0, 1, 3)
    return y.reshape(*y.shape[:2], ways * hidden), tuple(s.swapaxes(0, 1) for s in final)


def _gates(w, order):
    """(gates, H, ...) as (gates H, ...), in ONNX's order."""
    return w if order is None else w[list(order)].reshape(-1, *w.shape[2:])


def _biases(cells, order, hidden, dtype):
    """Both of each cell behind one another, (L, 2 gates H)."""
    if all(b is None for cell in cells for b in cell[2:]):
        return None
    shape = (hidden,) if order is None else (len(order), hidden)
    biases = [[np.zeros(shape, dtype) if b is None else b for b in cell[2:]] for cell in cells]
    return np.stack([np.concatenate([_gates(b, order) for b in pair]) for pair in biases])
