"""PyTorch: tensors in and out, gradients by autograd, and what of it is cross-checked.

A target is a function called like the reference's forward, but with tensors. Adding one is adding a row to TARGETS.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from refattn.attention.dot_product import multi_head
from refattn.core import Call, leaves, tree_map
from refattn.frameworks import Target
from refattn.oracle.contract import NotHandled
from refattn.primitives.gru_cell import Params as gru_cell_reference
from refattn.primitives.lstm_cell import Params as lstm_cell_reference

VERSION = torch.__version__


def run(candidate, args, options, dout):
    """Call it with tensors: (result, gradients) in NumPy; no gradients where dout is None."""
    args = tree_map(lambda x: _tensor(x).requires_grad_(dout is not None), tuple(args))
    result = candidate(*args, **{name: tree_map(_tensor, value) for name, value in options.items()})
    result = tuple(result) if isinstance(result, list) else result
    plain = tree_map(lambda y: _array(y.detach()) if isinstance(y, torch.Tensor) else y, result)
    if dout is None:
        return plain, None
    pairs = [(y, _tensor(d)) for (_, y), (_, d) in zip(leaves(result), leaves(dout)) if _differentiable(y, d)]
    inputs = [x for _, x in leaves(args)]
    grads = [None] * len(inputs)
    if pairs and inputs:
        outputs, douts = zip(*pairs)
        grads = torch.autograd.grad(outputs, inputs, douts, allow_unused=True)
    grads = iter(grads)
    return plain, tree_map(lambda x: _array(next(grads)), args)


def _tensor(x):
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":  # NumPy's is of ml_dtypes, which torch does not know
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _differentiable(y, d):
    return isinstance(y, torch.Tensor) and y.requires_grad and y.shape == d.shape and y.dtype == _tensor(d).dtype


def _array(x):
    if x is None or x.dtype != torch.bfloat16:
        return None if x is None else x.numpy()
    import ml_dtypes

    return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


# --- the targets ---------------------------------------------------------------------------------------------


def linear(x, params):
    return F.linear(x, params.weight, params.bias)


def conv(x, params, *, stride, padding, dilation, groups):
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return function(x, params.weight, params.bias, stride, padding, dilation, groups)


def batch_norm_train(x, params=None, *, eps=1e-5):
    gamma, beta = params or (None, None)
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)


def batch_norm_eval(x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        raise NotHandled("training")
    gamma, beta = params or (None, None)
    return F.batch_norm(x, stats.mean, stats.var, gamma, beta, training=False, eps=eps)


def layer_norm(x, params=None, *, axes, eps):
    gamma, beta = params or (None, None)
    return F.layer_norm(x, x.shape[-axes:], gamma, beta, eps)


def group_norm(x, params=None, *, groups, eps):
    if x[:, :1].numel() * x.shape[1] == len(x) * groups:
        raise NotHandled("groups of one number")
    gamma, beta = params or (None, None)
    return F.group_norm(x, groups, gamma, beta, eps)


def rms_norm(x, params=None, *, eps):
    return F.rms_norm(x, x.shape[-1:], params and params.gamma, eps)


def softmax(s, *, axis):
    return F.softmax(s, axis)


def log_softmax(s, *, axis):
    return F.log_softmax(s, axis)


def logsumexp(s, *, axis, keepdims):
    return torch.logsumexp(s, axis, keepdims)


def max_pool(x, *, kernel, stride, padding, dilation):
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise NotHandled("padding of more than half a kernel")
    function = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.ndim]
    return function(x, kernel, stride, padding, dilation)


def average_pool(x, *, kernel, stride, padding, count_include_pad):
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise NotHandled("padding of more than half a kernel")
    function = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim]
    return function(x, kernel, stride, padding, count_include_pad=count_include_pad)


def adaptive_average_pool(x, *, size):
    return {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[x.ndim](x, size)


def adaptive_max_pool(x, *, size):
    return {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}[x.ndim](x, size)


def bilinear_resize(x, *, size, align_corners):
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def bilinear_example(draw):
    """Steps of a power of two, whose positions are exact: torch rounds the others, the reference has them exactly."""
    align_corners, grow = draw.choice("align_corners", True, False), draw.choice("grow", True, False)
    before, after = [], []
    for axis in "HW":
        few, factor = draw.size(axis), draw.choice("factor", 1, 2, 4)
        many = (few - 1) * factor + 1 if align_corners else few * factor
        before.append(few if grow else many)
        after.append(many if grow else few)
    options = {"size": tuple(after), "align_corners": align_corners}
    return Call((draw.array(draw.size("N", high=2), draw.size("C", high=2), *before),), options)


def embedding(table, *, ids, padding_idx):
    return F.embedding(ids, table, padding_idx)


def rnn_cell(x, h, params):
    return _cell(nn.RNNCell, x, h, params)


def gru_cell(x, h, params):
    return _cell(nn.GRUCell, x, h, params)


def lstm_cell(x, state, params):
    return _cell(nn.LSTMCell, x, tuple(state), params)


def _cell(kind, x, state, params):
    weights = _cell_weights(params)
    hidden = weights["weight_hh"].shape[1]
    return functional_call(kind(x.shape[-1], hidden, bias="bias_ih" in weights), weights, (x, state))


def _cell_weights(params, suffix=""):
    """By torch's names, the gates one below the other; torch has both biases or none."""
    if params.w_x is None:
        raise NotHandled("inputs that are projected already")
    w_x, w_h = (w.reshape(-1, w.shape[-1]) for w in params[:2])
    weights = {"weight_ih": w_x, "weight_hh": w_h}
    if params.b_x is not None or params.b_h is not None:
        biases = (w_h.new_zeros(len(w_h)) if b is None else b.reshape(-1) for b in params[2:])
        weights |= dict(zip(("bias_ih", "bias_hh"), biases))
    return {name + suffix: w for name, w in weights.items()}


def scaled_dot_product(q, k, v, *, scale):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def scaled_dot_product_causal(q, k, v, *, scale, is_causal):
    if not is_causal:
        raise NotHandled("not causal")
    return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True)


def scaled_dot_product_masked(q, k, v, *, scale, mask):
    if mask is None:
        raise NotHandled("no mask")
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def grouped_query(q, k, v, *, order, scale, mask, is_causal):
    if order == "tile":
        raise NotHandled("the other order")
    if is_causal and mask is not None:
        raise NotHandled("causal, and a mask too")
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=is_causal, enable_gqa=True)


def dot_product_math(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None):
    """What is written out: in float32 for what is narrower, and rounded once."""
    with sdpa_kernel(SDPBackend.MATH):
        return _dot_product(q, k, v, attn_bias, attn_mask, is_causal, scale)


def dot_product(q, k, v, attn_bias=None, *, attn_mask=None, scale=None):
    """By the kernel that torch takes unless it is told."""
    _refuse_nan(q, k, v, attn_bias is not None or attn_mask is not None)
    return _dot_product(q, k, v, attn_bias, attn_mask, False, scale)


def dot_product_causal(q, k, v, *, is_causal=False, scale=None):
    if not is_causal:
        raise NotHandled("not causal")
    if q.shape[-1] != v.shape[-1]:
        raise NotHandled("values of another width: torch falls back to what is written out, a row of its own")
    _refuse_nan(q, k, v, False)
    if scale is not None and scale <= 0:
        raise NotHandled("causal with a scale of 0 or less: torch 2.13's fused kernel gives NaN")
    return _dot_product(q, k, v, None, None, True, scale)


def _dot_product(q, k, v, attn_bias, attn_mask, is_causal, scale):
    given = [name for name, x in (("bias", attn_bias is not None), ("mask", attn_mask is not None)) if x]
    given += ["causal"] * is_causal
    if len(given) > 1:
        raise NotHandled("a bias, a mask and causal: torch takes one of the three")
    mask = attn_mask if attn_bias is None else attn_bias
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def _refuse_nan(q, k, v, masked):
    """What torch 2.13's fused kernel does to NaN, and should not."""
    if q.dtype in (torch.bfloat16, torch.float16) and any(x.isnan().any() for x in (q, k, v)):
        raise NotHandled("NaN in low precision: on AMX torch 2.13's products let it out into other rows (oneDNN 5717)")
    if not masked and k.shape[2] < 16 and (q.isnan().any() or k.isnan().any()):
        raise NotHandled(
            "NaN, few keys, no mask: torch 2.13's fused kernel makes 0 of a row of NaN that fills no vector"
        )


def recurrent(x, state, params, *, direction):
    cells = params.cells
    kind = {gru_cell_reference: nn.GRU, lstm_cell_reference: nn.LSTM}.get(type(cells[0]), nn.RNN)
    ways = 2 if direction == "both" else 1
    if direction == "backward":
        raise NotHandled("backward alone")
    weights = {}
    for i, cell in enumerate(cells):
        weights |= _cell_weights(cell, f"_l{i // ways}" + ("_reverse" if i % ways else ""))
    hidden, bias = cells[0].w_h.shape[-1], "bias_ih_l0" in weights
    layers = {"num_layers": len(cells) // ways, "bidirectional": ways == 2}
    module = kind(x.shape[-1], hidden, bias=bias, batch_first=True, **layers)
    if state is not None:
        state = tuple(s.transpose(0, 1).contiguous() for s in state if s is not None)
        state = state if kind is nn.LSTM else state[0]
    y, final = functional_call(module, weights, (x, state))
    final = tuple(s.transpose(0, 1) for s in (final if kind is nn.LSTM else (final,)))
    return y, final


def multi_head_attention(q, k, v, params, *, heads, mask, key_mask, is_causal, add_zero_attn):
    weights = _attention_weights(params)
    module = nn.MultiheadAttention(
        q.shape[-1],
        heads,
        bias="in_proj_bias" in weights,
        add_bias_kv="bias_k" in weights,
        add_zero_attn=add_zero_attn,
        kdim=k.shape[-1],
        vdim=v.shape[-1],
        batch_first=True,
    )
    allowed = torch.ones(q.shape[0], heads, q.shape[1], k.shape[1], dtype=torch.bool) if mask is None else mask
    if is_causal:
        allowed = allowed.tril()
    options = {
        "attn_mask": None if mask is None and not is_causal else ~allowed.flatten(0, 1),
        "key_padding_mask": None if key_mask is None else ~key_mask,
        "need_weights": False,
    }
    return functional_call(module, weights, (q, k, v), options)[0]


def _attention_weights(params):
    """By torch's names: the first three projections one below the other, if they have as many inputs."""
    (wq, bq), (wk, bk), (wv, bv), (wo, bo), bias_k, bias_v = params
    if wq.shape == wk.shape == wv.shape:
        weights = {"in_proj_weight": torch.cat([wq, wk, wv]), "out_proj.weight": wo}
    else:
        weights = {"q_proj_weight": wq, "k_proj_weight": wk, "v_proj_weight": wv, "out_proj.weight": wo}
    if bq is not None:
        weights |= {"in_proj_bias": torch.cat([bq, bk, bv]), "out_proj.bias": bo}
    return weights if bias_k is None else weights | {"bias_k": bias_k[None, None], "bias_v": bias_v[None, None]}


def multi_head_example(draw):
    """As many features inside as outside, biases for all or none."""
    heads = draw.choice("heads", 1, 2, 3)
    features, b, queries, keys = heads * draw.size("E / heads"), draw.size("B"), draw.size("Q"), draw.size("K")
    f, g = draw.choice("F and G", (features, features), (draw.size("F"), draw.size("G")))
    biases = {"bias": draw.choice("bias", True, False), "bias_kv": draw.choice("learned token", False, True)}
    params = multi_head.init(draw.rng, features, key_features=f, value_features=g, **biases)
    options = {
        "heads": heads,
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, keys) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "add_zero_attn": draw.choice("add_zero_attn", False, True),
    }
    shapes = (b, queries, features), (b, keys, f), (b, keys, g)
    return Call((*(draw.array(*shape) for shape in shapes), draw.like(params)), options)


def transformer_encoder_layer(x, params, *, heads, norm_first, activation, key_mask, is_causal, eps):
    if activation not in ("relu", "gelu"):
        raise NotHandled(f"activation {activation}")
    weights = {f"self_attn.{name}": w for name, w in _attention_weights(params.attention).items()}
    for name, part in params.feed_forward._asdict().items() | {("norm1", params.norm1), ("norm2", params.norm2)}:
        weights |= {f"{name}.{kind}": w for kind, w in zip(("weight", "bias"), part) if w is not None}
    module = nn.TransformerEncoderLayer(
        x.shape[-1],
        heads,
        len(weights["linear1.weight"]),
        dropout=0,
        activation=activation,
        layer_norm_eps=eps,
        batch_first=True,
        norm_first=norm_first,
        bias="linear1.bias" in weights,
    )
    masks = {
        "src_mask": torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if is_causal else None,
        "src_key_padding_mask": None if key_mask is None else ~key_mask,
        "is_causal": is_causal,
    }
    return functional_call(module, weights, (x,), masks)


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"
FUSED = {form: f"torch_cpu_{form}" for form in EVERY_DTYPE[1:]}
# FlexAttention is not here: without its compiler torch 2.13 has no backward of it on the CPU; calls take seconds.
DOT_PRODUCT = {"dtypes": EVERY_DTYPE, "convention": "torch_sdpa", "times": 4}

TARGETS = (
    Target("scaled_dot_product_attention", "scaled_dot_product", scaled_dot_product),
    Target("scaled_dot_product_attention, causal", "scaled_dot_product", scaled_dot_product_causal),
    Target("scaled_dot_product_attention, mask", "scaled_dot_product", scaled_dot_product_masked),
    Target("scaled_dot_product_attention, enable_gqa", "grouped_query", grouped_query),
    Target(
        "scaled_dot_product_attention, options, math",
        "dot_product_attention",
        dot_product_math,
        arithmetic={"bfloat16": "bf16_upcast", "float16": "f16_upcast"},
        **DOT_PRODUCT,
    ),
    Target(
        "scaled_dot_product_attention, options", "dot_product_attention", dot_product, arithmetic=FUSED, **DOT_PRODUCT
    ),
    Target(
        "scaled_dot_product_attention, options, causal",
        "dot_product_attention",
        dot_product_causal,
        arithmetic=FUSED,
        **DOT_PRODUCT | {"convention": None, "times": 3},
    ),
    Target("nn.MultiheadAttention", "multi_head", multi_head_attention, multi_head_example),
    Target("nn.TransformerEncoderLayer", "transformer_encoder_layer", transformer_encoder_layer),
    Target("nn.RNN, nn.GRU, nn.LSTM", "recurrent", recurrent),
    Target("nn.RNNCell", "rnn_cell", rnn_cell),
    Target("nn.GRUCell", "gru_cell", gru_cell),
    Target("nn.LSTMCell", "lstm_cell", lstm_cell),
    Target("linear", "linear", linear),
    Target("conv1d, conv2d, conv3d", "conv", conv),
    Target("batch_norm, training", "batch_norm", batch_norm_train),
    Target("batch_norm, inference", "batch_norm", batch_norm_eval),
    Target("layer_norm", "layer_norm", layer_norm),
    Target("group_norm", "group_norm", group_norm),
    Target("rms_norm", "rms_norm", rms_norm),
    Target("softmax", "softmax", softmax),
    Target("log_softmax", "log_softmax", log_softmax),
    Target("logsumexp", "logsumexp", logsumexp),
    Target("max_pool", "max_pool", max_pool),
    Target("avg_pool", "average_pool", average_pool),
    Target("adaptive_avg_pool", "adaptive_average_pool", adaptive_average_pool),
    Target("adaptive_max_pool", "adaptive_max_pool", adaptive_max_pool),
    Target("interpolate, bilinear", "bilinear_resize", bilinear_resize, bilinear_example),
    Target("embedding", "embedding", embedding),
)
