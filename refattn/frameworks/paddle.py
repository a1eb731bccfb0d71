"""PaddlePaddle, on the CPU: tensors in and out, gradients by paddle.grad, and what of it is cross-checked.

A target is a function called like the reference's forward, but with tensors. On the CPU most of Paddle has no kernels
for bfloat16 and float16.
"""

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from refattn.core import Call, leaves, tree_map
from refattn.frameworks import Target
from refattn.frameworks._examples import attention_layer
from refattn.frameworks._examples import bilinear_resize as bilinear_example
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32
from refattn.oracle.contract import Departure, NotHandled
from refattn.primitives import batch_norm
from refattn.primitives import group_norm as reference_group_norm
from refattn.primitives import layer_norm as reference_layer_norm

VERSION = paddle.__version__


def run(candidate, args, options, dout):
    """Call it with tensors: (result, gradients) in NumPy; no gradients where dout is None."""
    paddle.set_device("cpu")
    args = tree_map(_tensor, tuple(args))
    for _, x in leaves(args):
        x.stop_gradient = dout is None
    result = candidate(*args, **{name: tree_map(_tensor, value) for name, value in options.items()})
    result = tuple(result) if isinstance(result, list) else result
    plain = tree_map(lambda y: _array(y) if isinstance(y, paddle.Tensor) else y, result)
    if dout is None:
        return plain, None
    pairs = [(y, _tensor(d)) for (_, y), (_, d) in zip(leaves(result), leaves(dout)) if _differentiable(y, d)]
    inputs = [x for _, x in leaves(args)]
    grads = [None] * len(inputs)
    if pairs and inputs:
        outputs, douts = map(list, zip(*pairs))
        grads = paddle.grad(outputs, inputs, douts, allow_unused=True)
    grads = iter(grads)
    return plain, tree_map(lambda x: _array(next(grads)), args)


def _tensor(x):
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":  # NumPy's is of ml_dtypes, which Paddle does not know
        return paddle.to_tensor(x.view(np.int16)).view("bfloat16")
    return paddle.to_tensor(x)


def _differentiable(y, d):
    return (
        isinstance(y, paddle.Tensor) and not y.stop_gradient and tuple(y.shape) == d.shape and _name(y) == d.dtype.name
    )


def _name(x):
    return str(x.dtype).removeprefix("paddle.")


def _array(x):
    if x is None or x.dtype != paddle.bfloat16:
        return None if x is None else x.numpy()
    import ml_dtypes

    return x.numpy().view(ml_dtypes.bfloat16)


# --- the targets ---------------------------------------------------------------------------------------------


def dot_product_attention(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None):
    if len([x for x in (attn_bias, attn_mask, is_causal or None) if x is not None]) > 1:
        raise NotHandled("a bias, a mask and causal: Paddle takes one of the three")
    allowed = paddle.ones([*q.shape[:3], k.shape[2]], "bool") if attn_mask is None else attn_mask
    allowed = (allowed.tril() if is_causal else allowed).expand([*q.shape[:3], k.shape[2]])
    _refuse_unseen(allowed.reshape([q.shape[0], k.shape[1], -1, k.shape[2]]).any(axis=2))
    scores = [x for x in (q, k, attn_bias) if x is not None]
    if q.dtype == paddle.float32 and k.shape[2] >= 8 and any(x.isnan().any() for x in scores):
        raise Departure("paddle-softmax-nan", "NaN among 8 scores or more, in float32: Paddle 3.3.1 gives the mean")
    mask = attn_mask if attn_bias is None else attn_bias
    given = (x.transpose([0, 2, 1, 3]) for x in (q, k, v))
    y = F.scaled_dot_product_attention(*given, mask, is_causal=is_causal, scale=None if scale is None else float(scale))
    return y.transpose([0, 2, 1, 3])


def multi_head_attention(q, k, v, params, *, heads, mask=None, key_mask=None, is_causal=False):
    layer = nn.MultiHeadAttention(q.shape[-1], heads, kdim=k.shape[-1], vdim=v.shape[-1])
    for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj", "out_proj"), params):
        _give(getattr(layer, name), weight=weight.T, bias=bias)
    allowed = paddle.ones([1, 1, q.shape[1], k.shape[1]], "bool")
    if is_causal:
        allowed = allowed.tril()
    for some in (mask, None if key_mask is None else key_mask[:, None, None]):
        if some is not None:
            allowed = allowed & some
    _refuse_unseen(allowed.any(axis=[1, 2]))
    return layer(q, k, v, allowed)


def _give(layer, **weights):
    """Tensors in the place of a layer's own parameters; None takes one away."""
    for name, w in weights.items():
        layer._parameters[name] = w


def rnn_cell(x, h, params):
    return _cell(nn.SimpleRNNCell, x, h, params)


def gru_cell(x, h, params):
    if params.w_x is None:
        raise NotHandled("what is projected already")
    return _cell(nn.GRUCell, x, h, params)


def lstm_cell(x, state, params):
    return _cell(nn.LSTMCell, x, tuple(state), params)


def _cell(kind, x, state, params):
    w_x, w_h = (w.reshape([-1, w.shape[-1]]) for w in params[:2])
    b_x, b_h = (None if b is None else b.flatten() for b in params[2:])
    cell = kind(x.shape[-1], w_h.shape[-1])
    _give(cell, weight_ih=w_x, weight_hh=w_h, bias_ih=b_x, bias_hh=b_h)
    _, new = cell(x, state)
    return new


def linear(x, params):
    return F.linear(x, params.weight.T, params.bias)


def conv(x, params, *, stride, padding, dilation, groups):
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return function(x, params.weight, params.bias, stride, list(padding), list(dilation), groups)


def embedding(table, *, ids, padding_idx):
    return F.embedding(ids, table, padding_idx)


def layer_norm_example(draw):
    """Paddle takes no eps above 0.001."""
    call = reference_layer_norm.example(draw)
    return call._replace(options=call.options | {"eps": 2.0**-10})


def layer_norm(x, params=None, *, axes, eps):
    gamma, beta = (None if p is None else p.flatten() for p in params or (None, None))
    return F.layer_norm(x, x.shape[-axes:], gamma, beta, eps)


def group_norm_example(draw):
    """With gamma, and none that is small next to its beta."""
    (x, _), options = reference_group_norm.example(draw)
    gamma, shift = draw.array(x.shape[1]), draw.array(x.shape[1])
    gamma = np.copysign(1 + abs(gamma), gamma)
    return Call((x, reference_group_norm.Params(gamma, gamma * np.tanh(shift))), options)


def group_norm(x, params=None, *, groups, eps):
    if params is None:
        raise Departure("paddle-group-norm", "no gamma: the gradient of x is wrong in Paddle 3.3.1")
    if (params.beta.abs() > 2 * params.gamma.abs()).any():
        raise Departure("paddle-group-norm", "a small gamma, by which Paddle 3.3.1 divides in its gradient")
    grouped = x.detach().reshape([x.shape[0], groups, -1])
    if (grouped.mean(axis=2) ** 2 > 4 * (grouped.var(axis=2, unbiased=False) + eps)).any():
        raise Departure("paddle-group-norm", "a mean of twice the deviation: Paddle 3.3.1 subtracts squares")
    return F.group_norm(x, groups, eps, *params)


def batch_norm_example(draw):
    """eps is a power of two: Paddle rounds it to float32."""
    call = batch_norm.example(draw)
    return call._replace(options=call.options | {"eps": draw.choice("eps", 2.0**-17, 2.0**-10)})


def batch_norm_train(x, params=None, *, eps=1e-5):
    stats = (f([x.shape[1]], x.dtype) for f in (paddle.zeros, paddle.ones))
    return F.batch_norm(x, *stats, *(params or (None, None)), training=True, epsilon=eps)


def batch_norm_eval(x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        raise NotHandled("training")
    return F.batch_norm(x, *stats, *(params or (None, None)), training=False, epsilon=eps)


def softmax(s, *, axis):
    return F.softmax(s, axis)


def log_softmax(s, *, axis):
    if (s.max(axis=axis) - s.min(axis=axis)).max() > 64:
        raise Departure("paddle-softmax-floor", "scores that differ by more than 64: Paddle 3.3.1 raises the lowest")
    return F.log_softmax(s, axis)


def logsumexp(s, *, axis, keepdims):
    return paddle.logsumexp(s, axis, keepdims)


def max_pool(x, *, kernel, stride, padding):
    function = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.ndim]
    return function(x, list(kernel), stride, list(padding))


def average_pool(x, *, kernel, stride, padding, count_include_pad):
    function = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim]
    return function(x, list(kernel), stride, list(padding), exclusive=not count_include_pad)


def adaptive_average_pool(x, *, size):
    return {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[x.ndim](x, size)


def adaptive_max_pool(x, *, size):
    return {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}[x.ndim](x, size)


def bilinear_resize(x, *, size, align_corners):
    size = [size] * 2 if isinstance(size, int) else list(size)
    if not align_corners and any(t == 1 < s for s, t in zip(x.shape[2:], size)):
        raise Departure("paddle-interpolate-to-one", "one pixel: Paddle 3.3.1 takes the first, not the middle")
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def _refuse_unseen(seen):
    """Keys that no query sees, whose gradients are 0."""
    if not seen.all():
        raise Departure(
            "paddle-softmax-floor", "a key that is masked for all: Paddle 3.3.1 gives it 1e-28 of the weight"
        )


# docs/findings/paddle-softmax-floor.md: no probability is less than e^-64 of the largest.
FLOOR = {
    name: ARITHMETICS[name]._replace(
        name=f"{name}, at least e^-64", softmax=ARITHMETICS[name].softmax._replace(least=-92), flush=True
    )
    for name in ("float64", "float32")
}

# In the gradients of the pools 1 / n is a number of float32, also for float64: the page paddle-float64.
SHARES = {"float64": ARITHMETICS["float64"]._replace(name="float64, shares of float32", softmax=FLOAT32)}

TARGETS = (
    Target(
        "scaled_dot_product_attention",
        "dot_product_attention",
        dot_product_attention,
        arithmetic=FLOOR,
        convention="paddle",
        times=3,
    ),
    Target("nn.MultiHeadAttention", "multi_head", multi_head_attention, attention_layer, arithmetic=FLOOR),
    Target("nn.SimpleRNNCell", "rnn_cell", rnn_cell),
    Target("nn.GRUCell", "gru_cell", gru_cell),
    Target("nn.LSTMCell", "lstm_cell", lstm_cell),
    Target("linear", "linear", linear),
    Target("conv1d, conv2d, conv3d", "conv", conv),
    Target("embedding", "embedding", embedding),
    Target("layer_norm", "layer_norm", layer_norm, layer_norm_example),
    Target("group_norm", "group_norm", group_norm, group_norm_example),
    Target("batch_norm, training", "batch_norm", batch_norm_train, batch_norm_example),
    Target("batch_norm, inference", "batch_norm", batch_norm_eval, batch_norm_example),
    Target("softmax", "softmax", softmax, arithmetic=FLOOR),
    Target("log_softmax", "log_softmax", log_softmax),
    Target("logsumexp", "logsumexp", logsumexp),
    Target("max_pool", "max_pool", max_pool),
    Target("avg_pool", "average_pool", average_pool, arithmetic=SHARES),
    Target("adaptive_avg_pool", "adaptive_average_pool", adaptive_average_pool, arithmetic=SHARES),
    Target("adaptive_max_pool", "adaptive_max_pool", adaptive_max_pool),
    Target("interpolate, bilinear", "bilinear_resize", bilinear_resize, bilinear_example),
)
