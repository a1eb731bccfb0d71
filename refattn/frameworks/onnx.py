"""ONNX: its operators as the reference computes them. NumPy arrays and attributes in, all outputs out.

    y, present_key, present_value, scores = attention(q, k, v, mask, is_causal=1)
    outputs = OPERATORS["RMSNormalization"](x, scale, axis=-1)

Inputs come in ONNX's order, None for those left out; attributes by ONNX's names. float16 and bfloat16 (of ml_dtypes)
are computed in float32, and rounded once. ONNX has no gradients. Its own node cases are run by tests/test_onnx.py.

TARGETS is the other direction: ONNX's own reference evaluator, next to ours.
"""

import functools

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from refattn.attention.dot_product import dot_product_attention, rotary
from refattn.attention.dot_product.dot_product_attention import STAGES
from refattn.frameworks import Target
from refattn.oracle.contract import NotHandled
from refattn.oracle.conventions import PRESETS
from refattn.primitives import layer_norm, rms_norm, softmax

VERSION = onnx.__version__
PRECISIONS = {1: "float32", 10: "float16", 11: "float64", 16: "float32"}  # 16 is bfloat16, which NumPy has not


def run(candidate, args, options, dout):
    """Call it with NumPy's arrays; there are no gradients."""
    return candidate(*args, **options), None


def attention(
    q, k, v, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *, is_causal=0, scale=None,
    softcap=0.0, q_num_heads=None, kv_num_heads=None, softmax_precision=None, qk_matmul_output_mode=0,
    left_window_size=-1, right_window_size=-1, opset=25,
):  # fmt: skip
    """Attention of opset 23, 24 or 25: (Y, present_key, present_value, qk_matmul_output).

    Mode 0 of the last is before the soft cap, as ONNX's text has it; onnx.reference (1.23.2) gives what is after it.
    """
    packed, dtype = q.ndim == 3, q.dtype
    q, k, v, past_key, past_value = (_wide(x) for x in (q, k, v, past_key, past_value))
    if packed:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    if past_key is not None:
        k, v = np.concatenate([past_key, k], axis=2), np.concatenate([past_value, v], axis=2)
    queries, keys = q.shape[2], k.shape[2]
    offset = 0 if past_key is None else past_key.shape[2]
    if nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen - queries
    mask, bias = None, None
    if attn_mask is not None:
        forbidden = False if attn_mask.dtype == bool else -np.inf
        missing = [(0, 0)] * (attn_mask.ndim - 1) + [(0, keys - attn_mask.shape[-1])]
        attn_mask = np.pad(_wide(attn_mask), missing, constant_values=forbidden)  # not stretched, even from 1
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
        mask, bias = (attn_mask, None) if attn_mask.dtype == bool else (None, attn_mask)
    out, saved = dot_product_attention.forward(
        *(q, k, v, bias),
        scale=scale,
        attn_mask=mask,
        is_causal=bool(is_causal),
        q_offset=offset,
        window=tuple(None if n == -1 else n for n in (left_window_size, right_window_size)),
        softcap=softcap or None,
        kv_seqlens=nonpad_kv_seqlen,
        return_scores=STAGES[qk_matmul_output_mode],
        convention=PRESETS[f"onnx_{opset}"]._replace(softmax_precision=PRECISIONS.get(softmax_precision)),
    )
    seen = np.ones(out.scores.shape, bool) if saved.seen is None else saved.seen
    seen = (seen if bias is None else seen & ~np.isneginf(bias)).any(axis=-1, keepdims=True)
    y = np.where(seen, out.y, 0)  # where no key takes part, even for NaN
    scores = np.where(seen, out.scores, 0) if qk_matmul_output_mode == 3 else out.scores
    y = _packed(y) if packed else y
    return tuple(x.astype(dtype) for x in (y, k, v, scores))


def rotary_embedding(
    x, cos, sin, position_ids=None, *, interleaved=0, num_heads=None, rotary_embedding_dim=0, opset=23
):
    """RotaryEmbedding: (Y,). rotary_embedding_dim says again how many columns cos and sin have."""
    dtype, packed = x.dtype, x.ndim == 3
    x, cos, sin = (_wide(a) for a in (x, cos, sin))
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    heads = _heads(x, num_heads) if packed else x
    y, _ = rotary.forward(heads, cos, sin, pairing="interleaved" if interleaved else "half")
    return ((_packed(y) if packed else y).astype(dtype),)


def layer_normalization(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1, opset=17):
    """LayerNormalization over the axes from `axis` on: (Y, Mean, InvStdDev)."""
    dtype, axes = x.dtype, x.ndim - axis % x.ndim
    x, scale, bias = _wide(x), _wide(scale), _wide(bias)
    bias = np.zeros_like(scale) if bias is None else bias
    y, saved = layer_norm.forward(x, layer_norm.Params(scale, bias), axes=axes, eps=epsilon)
    mean = x.mean(axis=tuple(range(-axes, 0)), keepdims=True)
    return y.astype(dtype), mean, saved.inverse_std


def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1, opset=23):
    """RMSNormalization over the axes from `axis` on: (Y,)."""
    lead, features = x.shape[: axis % x.ndim], scale.size
    y, _ = rms_norm.forward(_wide(x).reshape(*lead, features), rms_norm.Params(_wide(scale).ravel()), eps=epsilon)
    return (y.reshape(x.shape).astype(x.dtype),)


def softmax_(x, *, axis=-1, opset=13):
    """Softmax from opset 13 on: (output,)."""
    return (softmax.forward(_wide(x), axis=axis)[0].astype(x.dtype),)


OPERATORS = {
    "Attention": attention,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Softmax": softmax_,
}


def _wide(x):
    """float32 for what is narrower."""
    narrow = x is not None and x.dtype.name in ("float16", "bfloat16")
    return x.astype(np.float32) if narrow else x


def _heads(x, heads):
    """(B, T, H D) as (B, H, T, D)."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _packed(x):
    """(B, H, T, D) as (B, T, H D)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


# --- a model of one node, for whoever runs models ---------------------------------------------------------------


TYPES = {
    "float64": TensorProto.DOUBLE,
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bool": TensorProto.BOOL,
}


def attention_node(load, q, k, v, attn_bias, attn_mask, opset=23, **attributes):
    """Y of a node Attention. load(model) gives a function of {name: array} that returns the list of outputs."""
    if attn_bias is not None and attn_mask is not None:
        raise NotHandled("a mask and a bias at once: ONNX has one input for both")
    if k.shape[1] != v.shape[1]:
        raise NotHandled("keys and values with different numbers of heads")
    mask = attn_mask if attn_bias is None else attn_bias
    given = {"q": q, "k": k, "v": v}
    if mask is not None:  # its last two axes are not stretched
        lead = mask.shape[:-2]
        given["mask"] = np.ascontiguousarray(np.broadcast_to(mask, (*lead, q.shape[2], k.shape[2])))
    types = tuple((name, x.dtype.name, x.shape) for name, x in given.items())
    function = _of_types(load, types, opset, tuple(sorted((n, x) for n, x in attributes.items() if x is not None)))
    return function({name: np.ascontiguousarray(x) for name, x in given.items()})[0]


@functools.lru_cache(256)
def _of_types(load, types, opset, attributes):
    inputs = [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, dtype, shape in types]
    shape = (*types[0][2][:3], types[2][2][3])
    output = helper.make_tensor_value_info("out", TYPES[types[0][1]], shape)
    node = helper.make_node("Attention", [name for name, *_ in types], ["out"], **dict(attributes))
    graph = helper.make_graph([node], "attention", inputs, [output])
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def _evaluator(model):
    evaluator = ReferenceEvaluator(model)
    return lambda given: evaluator.run(None, given)


def reference_evaluator(
    q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None, softcap=None, window=None
):
    if scale is not None and not scale > 0:
        raise NotHandled("a scale of 0 or less: it takes the square root")
    if scale is not None and q.dtype == np.float64 and float(np.sqrt(np.float32(scale))) ** 2 != scale:
        raise NotHandled("a scale, in float64: its square root is one of float32")
    left, right = (-1 if n is None else n for n in window or (None, None))
    limits = {} if window is None else {"left_window_size": left, "right_window_size": right}
    return attention_node(
        *(_evaluator, q, k, v, attn_bias, attn_mask),
        opset=23 if window is None else 25,
        is_causal=int(is_causal),
        scale=scale,
        softcap=softcap,
        **limits,
    )


TARGETS = (
    Target(
        "reference evaluator, Attention",
        "dot_product_attention",
        reference_evaluator,
        dtypes=("float64", "float32"),
        convention="onnx_25",
        gradients=False,
        times=4,
    ),
)
