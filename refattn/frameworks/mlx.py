"""MLX, on the CPU: its arrays in and out, gradients by mx.vjp, and what of it is cross-checked.

A target is a function called like the reference's forward, but with MLX's arrays.
"""

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from refattn.core import leaves, tree_map
from refattn.frameworks import Target
from refattn.frameworks._examples import attention_layer, recurrent_layer
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32, FORMATS, OF_DTYPE
from refattn.oracle.contract import Departure, NotHandled
from refattn.oracle.conventions import PRESETS
from refattn.primitives import gru_cell, lstm_cell

VERSION = mx.__version__
DTYPES = {"float64": mx.float64, "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def run(candidate, args, options, dout):
    """Call it with MLX's arrays: (result, gradients) in NumPy; no gradients where dout is None."""
    with mx.stream(mx.cpu):
        return _run(candidate, args, options, dout)


def _run(candidate, args, options, dout):
    args = tree_map(_mlx, tuple(args))
    options = {name: tree_map(_mlx, value) for name, value in options.items()}
    if dout is None:
        return _plain(candidate(*args, **options)), None
    found = douts = None

    def differentiable(*inputs):
        nonlocal found, douts
        inputs = iter(inputs)
        found = candidate(*tree_map(lambda x: next(inputs), args), **options)
        found = tuple(found) if isinstance(found, list) else found
        pairs = [(y, _mlx(d)) for (_, y), (_, d) in zip(leaves(found), leaves(dout)) if _differentiable(y, d)]
        douts = [d for _, d in pairs]
        return [1 * y for y, _ in pairs]  # what is returned twice has one gradient only: docs/findings/mlx-vjp-twice.md

    inputs = [x for _, x in leaves(args)]
    differentiable(*inputs)
    result = _plain(found)
    if not douts:
        return result, tree_map(lambda x: None, args)
    _, grads = mx.vjp(differentiable, inputs, douts)
    grads = iter(grads)
    return result, tree_map(lambda x: _array(next(grads)), args)


def _mlx(x):
    return mx.array(x, dtype=DTYPES.get(x.dtype.name)) if isinstance(x, np.ndarray) else x


def _differentiable(y, d):
    return isinstance(y, mx.array) and y.shape == d.shape and y.dtype == DTYPES[d.dtype.name]


def _plain(result):
    result = tuple(result) if isinstance(result, list) else result
    return tree_map(lambda y: _array(y) if isinstance(y, mx.array) else y, result)


def _array(x):
    return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else np.array(x)


# --- the targets ---------------------------------------------------------------------------------------------


def dot_product_attention(q, k, v, attn_bias=None, sinks=None, *, attn_mask=None, is_causal=False, scale=None):
    if attn_bias is not None and attn_mask is not None:
        raise NotHandled("a mask and a bias at once: MLX has one argument for both")
    mask = attn_mask if attn_bias is None else attn_bias
    if is_causal and mask is not None:
        raise NotHandled("causal, and a mask or a bias")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = "causal" if is_causal else mask
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def multi_head_attention(q, k, v, params, *, heads, mask=None, key_mask=None, is_causal=False):
    projections = dict(zip(("query_proj", "key_proj", "value_proj", "out_proj"), params))
    widths = q.shape[-1], k.shape[-1], v.shape[-1], len(params.v.weight), len(params.out.weight)
    layer = nn.MultiHeadAttention(len(params.q.weight), heads, *widths, bias=params.q.bias is not None)
    layer.update({name: _named(projection._asdict()) for name, projection in projections.items()})
    allowed = mx.ones((1, 1, q.shape[1], k.shape[1]), mx.bool_)
    if is_causal:
        allowed = mx.tril(allowed)
    for some in (mask, None if key_mask is None else key_mask[:, None, None]):
        if some is not None:
            allowed = allowed & some
    return layer(q, k, v, allowed)


def recurrent(x, state, params):
    (cell,) = params.cells
    kind = {gru_cell.Params: nn.GRU, lstm_cell.Params: nn.LSTM}.get(type(cell), nn.RNN)
    hidden = cell.w_h.shape[-1]
    layer = kind(x.shape[-1], hidden, bias=cell.b_x is not None)
    w_x, w_h, b_x, b_h = (None if w is None else w.reshape(-1, w.shape[-1]) for w in cell)
    if kind is nn.RNN:
        weights = {"Wxh": w_x, "Whh": w_h, "bias": None if b_x is None else cell.b_x + cell.b_h}
    elif kind is nn.LSTM:
        weights = {"Wx": w_x, "Wh": w_h, "bias": None if b_x is None else (b_x + b_h).flatten()}
    else:  # of the candidate the two biases stay apart
        weights = {"Wx": w_x, "Wh": w_h}
        if b_x is not None:
            weights |= {"b": mx.concatenate([b_x[:2] + b_h[:2], b_x[2:]]).flatten(), "bhn": b_h[2]}
    layer.update(_named(weights))
    first = () if state is None else (s[:, 0] for s in state if s is not None)
    result = layer(x, *first)
    result = result if kind is nn.LSTM else (result,)
    return result[0], tuple(s[:, -1:] for s in result)


def linear(x, params):
    layer = nn.Linear(x.shape[-1], len(params.weight), bias=params.bias is not None)
    layer.update(_named(params._asdict()))
    return layer(x)


def conv(x, params, *, stride, padding, dilation, groups):
    if groups > 1 and x.ndim > 4:
        raise NotHandled("groups in three dimensions")
    y = mx.conv_general(_channels_last(x), _channels_last(params.weight), stride, padding, dilation, 1, groups)
    return _channels_first(y if params.bias is None else y + params.bias)


def embedding(table, *, ids):
    layer = nn.Embedding(*table.shape)
    layer.weight = table
    return layer(ids)


def layer_norm(x, params=None, *, axes=1, eps):
    if axes > 1:
        raise NotHandled("more than one axis")
    gamma, beta = params or (None, None)
    return mx.fast.layer_norm(x, gamma, beta, eps)


def rms_norm(x, params=None, *, eps):
    return mx.fast.rms_norm(x, params and params.gamma, eps)


def group_norm(x, params=None, *, groups, eps):
    layer = nn.GroupNorm(groups, x.shape[1], eps, affine=params is not None, pytorch_compatible=True)
    return _normalised(layer, x, params)


def batch_norm_train(x, params=None, *, eps=1e-5):
    if x.dtype == mx.float16:
        _refuse_float16(np.array(x.astype(mx.float32)), eps)
    return _normalised(nn.BatchNorm(x.shape[1], eps, affine=params is not None, track_running_stats=False), x, params)


def batch_norm_eval(x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        raise NotHandled("training")
    layer = nn.BatchNorm(x.shape[1], eps, affine=params is not None)
    layer.running_mean, layer.running_var = stats
    return _normalised(layer.eval(), x, params)


def _refuse_float16(x, eps):
    """Where the sum of the squares, or the gradient of rsqrt, is more than the largest float16."""
    variance = x.var(axis=(0, *range(2, x.ndim)))
    if ((variance + eps) ** -1.5).max() > 2**15 or variance.max() * x[:, 0].size > 2**15:
        raise Departure("mlx-batch-norm-float16", "float16, whose squares overflow in the statistics of MLX 0.32.4")


def _normalised(layer, x, params):
    if params is not None:
        layer.weight, layer.bias = params
    return _channels_first(layer(_channels_last(x)))


def softmax(s, *, axis):
    return mx.softmax(s, axis)


def softmax_precise(s, *, axis):
    return mx.softmax(s, axis, precise=True)


def log_softmax(s, *, axis):
    if s.shape[axis] == 1:
        raise Departure("mlx-log-softmax-crash", "an axis of length 1: MLX 0.32.4 crashes")
    return nn.log_softmax(s, axis)


def logsumexp(s, *, axis, keepdims):
    return mx.logsumexp(s, axis, keepdims=keepdims)


def max_pool(x, *, kernel, stride, padding):
    if _tied(np.array(x.astype(mx.float32)), kernel, stride, padding):
        raise NotHandled("equal maxima in a window: they share the gradient")
    kind = {3: nn.MaxPool1d, 4: nn.MaxPool2d, 5: nn.MaxPool3d}[x.ndim]
    return _pooled(kind, x, kernel, stride, padding)


def average_pool(x, *, kernel, stride, padding):
    kind = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}[x.ndim]
    return _pooled(kind, x, kernel, stride, padding)


def _pooled(kind, x, kernel, stride, padding):
    settled = (n if n is None or isinstance(n, int) else tuple(n) for n in (kernel, stride, padding))
    return _channels_first(kind(*settled)(_channels_last(x)))


def _tied(x, kernel, stride, padding):
    """Whether some window has its maximum twice."""
    axes = tuple(range(2, x.ndim))
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axes)
    steps = kernel if stride is None else (stride,) * len(kernel) if isinstance(stride, int) else stride
    windows = windows[(..., *(slice(None, None, n) for n in steps), *(slice(None),) * len(kernel))]
    windows = windows.reshape(-1, np.prod(kernel))
    return ((windows == windows.max(axis=-1, keepdims=True)).sum(axis=-1) > 1).any()


def _channels_last(x):
    return mx.moveaxis(x, 1, -1)


def _channels_first(x):
    return mx.moveaxis(x, -1, 1)


def _named(arrays):
    return {name: x for name, x in arrays.items() if x is not None}


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"

# docs/findings/mlx-float64.md: exp (mlx/backend/cpu/simd/math.h), layer_norm and rms_norm of float64 are of float32.
# exp multiplies by a log2(e) of float32, and is 0 below -88.
WIDE = ARITHMETICS["float64"]._replace(
    name="float64, float32 inside", softmax=FLOAT32, exp_error=4 * FLOAT32.u, flush=True
)
NORM = {"float64": WIDE._replace(name="float64, all of float32 inside", accumulator=FLOAT32)}
EXP = {"float64": WIDE, "float32": ARITHMETICS["float32"]._replace(name="float32, flush", flush=True)}
# Gradients that meet (the rows of an embedding, overlapping windows) are added in their own format: of 514 ones in
# bfloat16 256 are left, of 4098 in float16 2048 (tests/test_mlx.py).
SCATTERED = {
    name: ARITHMETICS[OF_DTYPE[name]]._replace(name=f"{name}, sums too", accumulator=FORMATS[name])
    for name in ("bfloat16", "float16")
}

TARGETS = (
    Target(
        "fast.scaled_dot_product_attention",
        "dot_product_attention",
        dot_product_attention,
        dtypes=EVERY_DTYPE,
        arithmetic=EXP,
        convention=PRESETS["mlx"]._replace(softmax_precision="float32"),
        times=3,
    ),
    Target("nn.MultiHeadAttention", "multi_head", multi_head_attention, attention_layer, EVERY_DTYPE, EXP),
    Target("nn.RNN, nn.GRU, nn.LSTM", "recurrent", recurrent, recurrent_layer, EVERY_DTYPE, EXP),
    Target("nn.Linear", "linear", linear, dtypes=EVERY_DTYPE),
    Target("conv_general", "conv", conv, dtypes=EVERY_DTYPE[1:]),
    Target("nn.Embedding", "embedding", embedding, None, EVERY_DTYPE, SCATTERED),
    Target("fast.layer_norm", "layer_norm", layer_norm, None, EVERY_DTYPE, NORM),
    Target("fast.rms_norm", "rms_norm", rms_norm, None, EVERY_DTYPE, NORM),
    Target("nn.GroupNorm", "group_norm", group_norm, None, EVERY_DTYPE, NORM),
    Target("nn.BatchNorm, training", "batch_norm", batch_norm_train, dtypes=EVERY_DTYPE),
    Target("nn.BatchNorm, inference", "batch_norm", batch_norm_eval, dtypes=EVERY_DTYPE),
    Target("softmax", "softmax", softmax, None, EVERY_DTYPE, EXP),
    Target("softmax, precise", "softmax", softmax_precise, dtypes=EVERY_DTYPE[2:]),
    Target("nn.log_softmax", "log_softmax", log_softmax, None, EVERY_DTYPE, EXP),
    Target("logsumexp", "logsumexp", logsumexp, None, EVERY_DTYPE, EXP),
    Target("nn.MaxPool", "max_pool", max_pool, None, EVERY_DTYPE, SCATTERED),
    Target("nn.AvgPool", "average_pool", average_pool, None, EVERY_DTYPE, SCATTERED),
)
