"""OpenVINO, on the CPU: NumPy arrays in and out, no gradients, and what of it is cross-checked.

A target is a function called like the reference's forward, with NumPy's arrays; it runs a model of one operator, which
is compiled for its shapes, with the hint to compute in float32. float64 is not here: it is cast to float32.
"""

import functools

import ml_dtypes
import numpy as np
import openvino
from openvino import opset14
from openvino import opset16 as ops
from openvino.utils.types import get_element_type

from refattn.frameworks import Target
from refattn.frameworks._examples import bilinear_resize as bilinear_example
from refattn.frameworks.onnx import run
from refattn.oracle.contract import Departure, NotHandled

__all__ = ["TARGETS", "VERSION", "run"]
VERSION = openvino.__version__
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}


def _model(make, *arrays, **attributes):
    """The outputs of a model that is made of the parameters `arrays`, None for those left out."""
    types = tuple(None if x is None else (x.dtype, x.shape) for x in arrays)
    request = _compiled(make, types, tuple(sorted(attributes.items())))
    request.infer([_tensor(x) for x in arrays if x is not None])
    return [_array(request.get_output_tensor(i)) for i in range(len(request.model_outputs))]


@functools.lru_cache(512)
def _compiled(make, types, attributes):
    parameters = [None if t is None else ops.parameter(list(t[1]), _type(t[0])) for t in types]
    made = make(*parameters, **dict(attributes))
    model = openvino.Model(made.outputs(), [p for p in parameters if p is not None])
    return openvino.Core().compile_model(model, "CPU", SETTINGS).create_infer_request()


def _type(dtype):
    return openvino.Type.bf16 if dtype.name == "bfloat16" else get_element_type(dtype.type)


def _tensor(x):
    x = np.array(x, order="C")
    return (
        openvino.Tensor(x.view(np.int16), x.shape, openvino.Type.bf16)
        if x.dtype.name == "bfloat16"
        else openvino.Tensor(x)
    )


def _array(tensor):
    if tensor.element_type == openvino.Type.bf16:
        return np.array(tensor.data).view(np.uint16).view(ml_dtypes.bfloat16)
    return np.array(tensor.data)


# --- the targets ---------------------------------------------------------------------------------------------


def dot_product_attention(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None):
    if len([x for x in (attn_bias, attn_mask, is_causal or None) if x is not None]) > 1:
        raise NotHandled("a bias, a mask and causal: OpenVINO takes one of the three")
    if q.shape[1] != k.shape[1]:
        raise NotHandled("heads that share keys")
    mask = attn_mask if attn_bias is None else attn_bias
    if attn_mask is not None and q.dtype.name == "bfloat16" and not attn_mask.any(-1).all() and _masks_by_a_number():
        raise Departure("openvino-bf16-masked-row", "nothing to attend to, in bfloat16: OpenVINO 2026.4 gives the mean")
    if scale is not None:
        mask, scale = np.zeros((1, 1), q.dtype) if mask is None else mask, np.full(1, scale, q.dtype)
    return _model(_attention, q, k, v, mask, scale, causal=is_causal)[0]


def _attention(q, k, v, mask, scale, *, causal):
    return ops.scaled_dot_product_attention(q, k, v, mask, scale, causal)


@functools.cache
def _masks_by_a_number():
    """Whether a masked score of bfloat16 is a number on this CPU, not -inf."""
    x = np.ones((1, 1, 1, 1), ml_dtypes.bfloat16)
    return not np.isnan(_model(_attention, x, x, x, np.zeros((1, 1), bool), None, causal=False)[0]).any()


def linear(x, params):
    return _model(_linear, x, *params)[0]


def _linear(x, weight, bias):
    y = ops.matmul(x, weight, False, True)
    return y if bias is None else ops.add(y, bias)


def conv(x, params, *, stride, padding, dilation, groups):
    weight, bias = params
    n = x.ndim - 2
    if groups > 1:
        weight = weight.reshape(groups, -1, *weight.shape[1:])
    bias = None if bias is None else bias.reshape(-1, *(1,) * n)
    settled = {"stride": stride, "padding": padding, "dilation": dilation}
    return _model(_conv, x, weight, bias, grouped=groups > 1, **{k: _each(v, n) for k, v in settled.items()})[0]


def _conv(x, weight, bias, *, grouped, stride, padding, dilation):
    function = ops.group_convolution if grouped else ops.convolution
    y = function(x, weight, list(stride), list(padding), list(padding), list(dilation))
    return y if bias is None else ops.add(y, bias)


def embedding(table, *, ids):
    return _model(_embedding, table, ids)[0]


def _embedding(table, ids):
    return ops.gather(table, ids, 0)


def softmax(s, *, axis):
    return _model(_softmax, s, axis=axis)[0]


def _softmax(s, *, axis):
    return ops.softmax(s, axis)


def log_softmax(s, *, axis):
    return _model(_log_softmax, s, axis=axis)[0]


def _log_softmax(s, *, axis):
    return ops.log_softmax(s, axis)


def layer_norm(x, params=None, *, axes, eps):
    return _model(_layer_norm, x, *(params or (None, None)), axes=axes, eps=eps)[0]


def _layer_norm(x, gamma, beta, *, axes, eps):
    y = ops.mvn(x, list(range(-axes, 0)), True, eps, "inside_sqrt")
    y = y if gamma is None else ops.multiply(y, gamma)
    return y if beta is None else ops.add(y, beta)


def group_norm(x, params=None, *, groups, eps):
    params = params or (np.ones(x.shape[1], x.dtype), np.zeros(x.shape[1], x.dtype))
    return _model(_group_norm, x, *params, groups=groups, eps=eps)[0]


def _group_norm(x, gamma, beta, *, groups, eps):
    return ops.group_normalization(x, gamma, beta, groups, eps)


def batch_norm(x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        raise NotHandled("training")
    params = params or (np.ones(x.shape[1], x.dtype), np.zeros(x.shape[1], x.dtype))
    return _model(_batch_norm, x, *params, *stats, eps=eps)[0]


def _batch_norm(x, gamma, beta, mean, variance, *, eps):
    return ops.batch_norm_inference(x, gamma, beta, mean, variance, eps)


def max_pool(x, *, kernel, stride, padding, dilation):
    n = x.ndim - 2
    settled = {"stride": kernel if stride is None else stride, "padding": padding, "dilation": dilation}
    return _model(_max_pool, x, kernel=kernel, **{k: _each(v, n) for k, v in settled.items()})[0]


def _max_pool(x, *, kernel, stride, padding, dilation):
    return ops.max_pool(x, list(stride), list(dilation), list(padding), list(padding), list(kernel))


def average_pool(x, *, kernel, stride, padding, count_include_pad):
    n = x.ndim - 2
    settled = {"stride": _each(kernel if stride is None else stride, n), "padding": _each(padding, n)}
    return _model(_average_pool, x, kernel=kernel, padded=count_include_pad, **settled)[0]


def _average_pool(x, *, kernel, stride, padding, padded):
    # AvgPool-16 crashes on the CPU: docs/findings/openvino-avg-pool-16.md.
    return opset14.avg_pool(x, list(stride), list(padding), list(padding), list(kernel), not padded)


def adaptive_average_pool(x, *, size):
    return _model(_adaptive_average_pool, x, size=_each(size, x.ndim - 2))[0]


def _adaptive_average_pool(x, *, size):
    return ops.adaptive_avg_pool(x, list(size))


def adaptive_max_pool(x, *, size):
    return _model(_adaptive_max_pool, x, size=_each(size, x.ndim - 2))[0]


def _adaptive_max_pool(x, *, size):
    return ops.adaptive_max_pool(x, list(size), "i32")


def bilinear_resize(x, *, size, align_corners):
    return _model(_bilinear_resize, x, size=_each(size, 2), mode="align_corners" if align_corners else "half_pixel")[0]


def _bilinear_resize(x, *, size, mode):
    return ops.interpolate(x, list(size), "linear_onnx", "sizes", axes=[2, 3], coordinate_transformation_mode=mode)


def rnn_cell(x, h, params):
    return _model(_rnn_cell, x, h, *_gates(params, [0]))[0]


def _rnn_cell(x, h, w_x, w_h, bias):
    return ops.rnn_cell(x, h, w_x, w_h, bias, w_h.shape[1], ["tanh"], [], [])


def gru_cell(x, h, params, *, reset_after, z_weighs):
    if params.w_x is None or z_weighs == "new":
        raise NotHandled("what is projected already, or z that weighs the new state")
    b_x, b_h = (np.zeros_like(params.w_x[..., 0]) if b is None else b for b in params[2:])
    apart = [b_x[2], b_h[2]] if reset_after else [b_x[2] + b_h[2]]
    bias = np.concatenate([b_x[1] + b_h[1], b_x[0] + b_h[0], *apart])
    weights = (w[[1, 0, 2]].reshape(-1, w.shape[-1]) for w in params[:2])
    return _model(_gru_cell, x, h, *weights, bias, reset_after=reset_after)[0]


def _gru_cell(x, h, w_x, w_h, bias, *, reset_after):
    return ops.gru_cell(x, h, w_x, w_h, bias, w_h.shape[1], ["sigmoid", "tanh"], [], [], 0.0, reset_after)


def lstm_cell(x, state, params):
    return tuple(_model(_lstm_cell, x, *state, *_gates(params, [1, 0, 2, 3])))


def _lstm_cell(x, h, c, w_x, w_h, bias):
    return ops.lstm_cell(x, h, c, w_x, w_h, bias, w_h.shape[1])


def _gates(params, order):
    """Weights, and the sum of both biases, the gates in this order one below the other."""
    w_x, w_h, b_x, b_h = (x if x is None or len(order) == 1 else x[order] for x in params)
    biases = [b for b in (b_x, b_h) if b is not None] or [np.zeros_like(w_x[..., 0])]
    return w_x.reshape(-1, w_x.shape[-1]), w_h.reshape(-1, w_h.shape[-1]), sum(biases[1:], biases[0]).ravel()


def _each(value, n):
    return (int(value),) * n if np.ndim(value) == 0 else tuple(map(int, value))


EVERY_DTYPE = "float32", "bfloat16", "float16"
FORWARD = {"dtypes": EVERY_DTYPE, "gradients": False}
# The plugin has no max_pool nor group_normalization of bfloat16, and its convolution of it crashes where a kernel of 1
# has stride 2 in grouped, padded channels.
NO_BFLOAT16 = FORWARD | {"dtypes": ("float32", "float16")}

TARGETS = (
    Target(
        "ScaledDotProductAttention",
        "dot_product_attention",
        dot_product_attention,
        convention="openvino",
        times=3,
        **FORWARD,
    ),
    Target("RNNCell", "rnn_cell", rnn_cell, **FORWARD),
    Target("GRUCell", "gru_cell", gru_cell, **FORWARD),
    Target("LSTMCell", "lstm_cell", lstm_cell, **FORWARD),
    Target("MatMul", "linear", linear, **FORWARD),
    Target("Convolution, GroupConvolution", "conv", conv, **NO_BFLOAT16),
    Target("Gather", "embedding", embedding, **FORWARD),
    Target("SoftMax", "softmax", softmax, **FORWARD),
    Target("LogSoftmax", "log_softmax", log_softmax, **FORWARD),
    Target("MVN", "layer_norm", layer_norm, **FORWARD),
    Target("GroupNormalization", "group_norm", group_norm, **NO_BFLOAT16),
    Target("BatchNormInference", "batch_norm", batch_norm, **FORWARD),
    Target("MaxPool", "max_pool", max_pool, **NO_BFLOAT16),
    Target("AvgPool", "average_pool", average_pool, **FORWARD),
    Target("AdaptiveAvgPool", "adaptive_average_pool", adaptive_average_pool, **FORWARD),
    Target("AdaptiveMaxPool", "adaptive_max_pool", adaptive_max_pool, **FORWARD),
    Target("Interpolate", "bilinear_resize", bilinear_resize, bilinear_example, **FORWARD),
)
