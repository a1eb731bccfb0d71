"""PyTorch: tensors in and out, gradients by autograd, and what of it is cross-checked.

A target is a function called like the reference's forward, but with tensors. Adding one is adding a row to TARGETS.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from refattn.attention.dot_product import multi_head
from refattn.core import Call, leaves, tree_map
from refattn.frameworks import Target
from refattn.oracle.contract import NotHandled

VERSION = torch.__version__


def run(candidate, args, options, dout):
    """Call it with tensors: (result, gradients) in NumPy; no gradients where dout is None."""
    args = tree_map(lambda x: _tensor(x).requires_grad_(dout is not None), tuple(args))
    result = candidate(*args, **{name: tree_map(_tensor, value) for name, value in options.items()})
    result = tuple(result) if isinstance(result, list) else result
    plain = tree_map(lambda y: y.detach().numpy() if isinstance(y, torch.Tensor) else y, result)
    if dout is None:
        return plain, None
    pairs = [(y, _tensor(d)) for (_, y), (_, d) in zip(leaves(result), leaves(dout))]
    pairs = [(y, d) for y, d in pairs if getattr(y, "requires_grad", False) and (y.shape, y.dtype) == (d.shape, d.dtype)]
    inputs = [x for _, x in leaves(args)]
    grads = [None] * len(inputs)
    if pairs and inputs:
        outputs, douts = zip(*pairs)
        grads = torch.autograd.grad(outputs, inputs, douts, allow_unused=True)
    grads = iter(grads)
    return plain, tree_map(lambda x: _array(next(grads)), args)


def _tensor(x):
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def _array(gradient):
    return None if gradient is None else gradient.numpy()


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


def softmax(s, *, axis):
    return F.softmax(s, axis)


def log_softmax(s, *, axis):
    return F.log_softmax(s, axis)


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
    """torch's names, the gates below one another; it has both biases or none."""
    if params.w_x is None:
        raise NotHandled("inputs that are projected already")
    arrays = {"weight_ih": params.w_x, "weight_hh": params.w_h, "bias_ih": params.b_x, "bias_hh": params.b_h}
    if params.b_x is None and params.b_h is None:
        del arrays["bias_ih"], arrays["bias_hh"]
    hidden = params.w_h.shape[-1]
    rows = params.w_h.numel() // hidden
    zero = params.w_h.new_zeros(rows)
    return {name + suffix: zero if a is None else a.reshape(rows, *a.shape[params.w_h.ndim - 1 :] if "w" in name else ())
            for name, a in arrays.items()}  # fmt: skip


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


def multi_head_attention(q, k, v, params, *, heads, mask, key_mask, is_causal):
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = params
    module = nn.MultiheadAttention(q.shape[-1], heads, bias=bq is not None, batch_first=True)
    weights = {"in_proj_weight": torch.cat([wq, wk, wv]), "out_proj.weight": wo}
    if bq is not None:
        weights |= {"in_proj_bias": torch.cat([bq, bk, bv]), "out_proj.bias": bo}
    allowed = torch.ones(q.shape[0], heads, q.shape[1], k.shape[1], dtype=torch.bool) if mask is None else mask
    if is_causal:
        allowed = allowed.tril()
    options = {
        "attn_mask": None if mask is None and not is_causal else ~allowed.flatten(0, 1),
        "key_padding_mask": None if key_mask is None else ~key_mask,
        "need_weights": False,
    }
    return functional_call(module, weights, (q, k, v), options)[0]


def multi_head_example(draw):
    """As many features everywhere, biases for all or none."""
    heads = draw.choice("heads", 1, 2, 3)
    features, b, queries, keys = heads * draw.size("E / heads"), draw.size("B"), draw.size("Q"), draw.size("K")
    params = multi_head.init(draw.rng, features, bias=draw.choice("bias", True, False))
    options = {
        "heads": heads,
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, keys) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    shapes = (b, queries, features), (b, keys, features), (b, keys, features)
    return Call((*(draw.array(*shape) for shape in shapes), draw.like(params)), options)


TARGETS = (
    Target("scaled_dot_product_attention", "scaled_dot_product", scaled_dot_product),
    Target("scaled_dot_product_attention, causal", "scaled_dot_product", scaled_dot_product_causal),
    Target("scaled_dot_product_attention, mask", "scaled_dot_product", scaled_dot_product_masked),
    Target("nn.MultiheadAttention", "multi_head", multi_head_attention, multi_head_example),
    Target("nn.RNNCell", "rnn_cell", rnn_cell),
    Target("nn.GRUCell", "gru_cell", gru_cell),
    Target("nn.LSTMCell", "lstm_cell", lstm_cell),
    Target("linear", "linear", linear),
    Target("conv1d, conv2d, conv3d", "conv", conv),
    Target("batch_norm, training", "batch_norm", batch_norm_train),
    Target("batch_norm, inference", "batch_norm", batch_norm_eval),
    Target("layer_norm", "layer_norm", layer_norm),
    Target("softmax", "softmax", softmax),
    Target("log_softmax", "log_softmax", log_softmax),
    Target("max_pool", "max_pool", max_pool),
    Target("avg_pool", "average_pool", average_pool),
    Target("adaptive_avg_pool", "adaptive_average_pool", adaptive_average_pool),
    Target("adaptive_max_pool", "adaptive_max_pool", adaptive_max_pool),
    Target("interpolate, bilinear", "bilinear_resize", bilinear_resize),
    Target("embedding", "embedding", embedding),
)
