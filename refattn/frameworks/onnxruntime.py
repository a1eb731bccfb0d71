"""ONNX Runtime, on the CPU: NumPy arrays in and out, no gradients.

A target is a function called like the reference's forward, with NumPy's arrays; it runs a model of one node.
"""

import onnxruntime

from refattn.frameworks import Target
from refattn.frameworks.onnx import attention_node, run
from refattn.oracle.contract import NotHandled

__all__ = ["TARGETS", "VERSION", "run"]
VERSION = onnxruntime.__version__


def attention(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None, softcap=None):
    """Attention of opset 23."""
    if scale is not None and not scale > 0:
        raise NotHandled("a scale of 0 or less, which ONNX Runtime refuses")
    return attention_node(
        *(_session, q, k, v, attn_bias, attn_mask), is_causal=int(is_causal), scale=scale, softcap=softcap
    )


def _session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)


TARGETS = (
    Target(
        "Attention",
        "dot_product_attention",
        attention,
        dtypes=("float32", "float16"),
        arithmetic={"float32": "onnxruntime_cpu_float32", "float16": "onnxruntime_cpu_float16"},
        convention="ort_attention",
        gradients=False,
        times=4,
    ),
)
