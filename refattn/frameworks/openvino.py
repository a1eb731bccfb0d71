"""OpenVINO, on the CPU: NumPy arrays in and out, no gradients, and what of it is cross-checked.

A target is a function called like the reference's forward, with NumPy's arrays; it runs a model of one operator, which
is compiled for its shapes, and computes in float32 whatever it is given. float64 is not here: it is cast to float32.
"""

import functools

import ml_dtypes
import numpy as np
import openvino
from openvino import opset14, opset15
from openvino.utils.types import get_element_type

from refattn.frameworks import Target
from refattn.frameworks._examples import attention_layer
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
    parameters = [None if t is None else opset14.parameter(list(t[1]), _type(t[0])) for t in types]
    made = make(*parameters, **dict(attributes))
    model = openvino.Model(made.outputs(), [p for p in parameters if p is not None])
    return openvino.Core().compile_model(model, "CPU", SETTINGS).create_infer_request()


def _type(dtype):
    return openvino.Type.bf16 if dtype.name == "bfloat16" else get_element_type(dtype.type)


def _tensor(x):
    x = np.ascontiguousarray(x)
    return openvino.Tensor(x.view(np.int16), x.shape, openvino.Type.bf16) if x.dtype.name == "bfloat16" else openvino.Tensor(x)


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
    if scale is not None:
        mask, scale = np.zeros((1, 1), q.dtype) if mask is None else mask, np.full(1, scale, q.dtype)
    return _model(_attention, q, k, v, mask, scale, causal=is_causal)[0]


def _attention(q, k, v, mask, scale, *, causal):
    return opset14.scaled_dot_product_attention(q, k, v, mask, scale, causal)


LOW = "bfloat16", "float16"
EVERY_DTYPE = "float32", *LOW
UPCAST = {"bfloat16": "bf16_upcast", "float16": "f16_upcast"}

TARGETS = (
    Target(
        "ScaledDotProductAttention",
        "dot_product_attention",
        dot_product_attention,
        dtypes=EVERY_DTYPE,
        convention="openvino",
        gradients=False,
        times=3,
    ),
)
