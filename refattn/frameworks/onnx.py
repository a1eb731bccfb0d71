"""ONNX: its operators as the reference computes them. NumPy arrays and attributes in, all outputs out.

    y, present_key, present_value, scores = attention(q, k, v, mask, is_causal=1)
    outputs = OPERATORS["RMSNormalization"](x, scale, axis=-1)

Inputs come in ONNX's order, None for those left out; attributes by ONNX's names. float16 and bfloat16 (of ml_dtypes)
are computed in float32, and rounded once. ONNX has no gradients. Its own node cases are run by tests/test_onnx.py.

TARGETS is the other direction: the operators as ONNX's own reference evaluator computes them, next to ours.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from refattn.attention.dot_product import dot_product_attention, rotary
from refattn.attention.dot_product.dot_product_attention import STAGES
from refattn.frameworks import Target
from refattn.frameworks import _onnx_nodes as nodes
from refattn.frameworks._examples import bilinear_resize as bilinear_example
from refattn.oracle.arithmetic import ARITHMETICS, FORMATS, OF_DTYPE
from refattn.oracle.contract import Departure, NotHandled
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


# --- the reference evaluator, next to ours ------------------------------------------------------------------------


def _evaluator(model):
    evaluator = ReferenceEvaluator(model)

    def run_quietly(given):
        with np.errstate(all="ignore"):
            return evaluator.run(None, given)

    return run_quietly


_of_evaluator = functools.partial(nodes.candidate, _evaluator)


def _refuse_scale(q, *args, scale=None, **options):
    if scale is not None and q.dtype == np.float64 and float(np.sqrt(np.float32(scale))) ** 2 != scale:
        words = "onnx.reference 1.23.2 takes the square root of a scale in float32, in float64 too"
        raise Departure("onnx-reference-scale-root", words)


def _refuse_scores(q, *args, return_scores, softcap=None, **options):
    _refuse_scale(q, *args, **options)
    if return_scores == "scaled" and softcap is not None:
        words = "qk_matmul_output_mode 0 of onnx.reference 1.23.2 is after the soft cap"
        raise Departure("onnx-reference-qk-matmul-output", words)


def _refuse_spread(s, *, axis):
    """Logarithms of what underflows, or is rounded to few digits."""
    OF_AXIS(s, axis=axis)
    with np.errstate(all="ignore"):
        low = (s.min(axis=axis) - s.max(axis=axis)).min(initial=0)
    if low - np.log(s.shape[axis]) < np.log(FORMATS[s.dtype.name].tiny):
        words = "LogSoftmax of onnx.reference 1.23.2 is the logarithm of the softmax: -inf where that underflows"
        raise Departure("onnx-reference-log-softmax", words)


def _refuse_sums(count, squares=None):
    """In 16 bits, of more than can be added up there: `count` numbers, or squares over the axes `squares`."""

    def refuse(x, *args, **options):
        many = x.dtype.name == "bfloat16" and count(x, **options) > 128
        if squares is not None and x.dtype == np.float16:
            wide, axes = x.astype(np.float64), squares(x, **options)
            many = ((wide - wide.mean(axis=axes, keepdims=True)) ** 2).sum(axis=axes).max() > np.finfo(x.dtype).max
        if many:
            words = (
                "onnx.reference 1.23.2 sums 16 bits in 16 bits: 1 + 1 + ... stops at 256 in bfloat16, at inf in float16"
            )
            raise Departure("onnx-reference-sums", words)

    return refuse


def _refuse_quotients(x, *, size, align_corners):
    """Positions come from the quotient of lengths, and are as exact as that is."""
    sizes = (size, size) if isinstance(size, int) else size
    if (
        x.dtype == np.float64
        and align_corners
        and any(Fraction(n / m) != Fraction(n, m) for n, m in zip(sizes, x.shape[2:]))
    ):
        raise NotHandled("align_corners, in float64, where the quotient of the lengths is rounded")


def _refuse_pads(x, *, stride, padding, dilation, kernel):
    strides, dilations = (
        (n,) * (x.ndim - 2) if isinstance(n, int) else n for n in (kernel if stride is None else stride, dilation)
    )
    alike = x.ndim == 4 and len(set(padding)) == 1
    if max(*strides, *dilations) == 1 and any(padding) and not alike:
        words = "MaxPool of onnx.reference 1.23.2, stride 1: pads have to be the same for both axes of an image"
        raise Departure("onnx-reference-max-pool-pads", words)


def _refuse_lengths(x, *args, mask=None, **options):
    if mask is not None and not mask.all():
        words = "RNN, GRU and LSTM of onnx.reference 1.23.2 take no notice of sequence_lens"
        raise Departure("onnx-reference-sequence-lens", words)


# Of 16 bits it rounds every result of NumPy: scale times q and scale times k (`operands`), exp, the sum, the quotient.
# Products are summed in float32, np.sum is in bfloat16 (1 + 1 + ... stops at 256), in float32 for float16.
LOW = {
    form.name: ARITHMETICS[OF_DTYPE[form.name]]._replace(
        name=f"onnx_reference_{form.name}", operands=form, softmax=form, exp_error=4 * form.u, tanh_error=8 * form.u
    )
    for form in (FORMATS["float16"], FORMATS["bfloat16"])
}
SUMS = {
    "bfloat16": ARITHMETICS[OF_DTYPE["bfloat16"]]._replace(name="onnx_reference_sums", accumulator=FORMATS["bfloat16"])
}
EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"


def _target(name, like, function, **more):
    return Target(name, like, function, **{"dtypes": EVERY_DTYPE, "gradients": False} | more)


OF_LAYER = _refuse_sums(lambda x, axes, **_: math.prod(x.shape[-axes:]), lambda x, axes, **_: tuple(range(-axes, 0)))
OF_LAST = _refuse_sums(lambda x, **_: x.shape[-1])
OF_GROUP = _refuse_sums(lambda x, groups, **_: x[0].size // groups)
OF_CHANNEL = _refuse_sums(lambda x, **_: x[:, 0].size, lambda x, **_: (0, *range(2, x.ndim)))
OF_AXIS = _refuse_sums(lambda x, axis, **_: x.shape[axis])
ATTENTION = {"like": "dot_product_attention", "arithmetic": LOW, "times": 4}

TARGETS = (
    _target(
        "Attention-23", function=_of_evaluator(nodes.attention_23, _refuse_scale), convention="onnx_23", **ATTENTION
    ),
    _target(
        "Attention-23, packed",
        function=_of_evaluator(nodes.attention_23, _refuse_scale, packed=True),
        convention="onnx_23",
        **ATTENTION,
    ),
    _target(
        "Attention-24, nonpad_kv_seqlen",
        function=_of_evaluator(nodes.attention_of_cache, _refuse_scale),
        convention=PRESETS["onnx_24"]._replace(q_offset="bottom_right"),
        **ATTENTION,
    ),
    _target(
        "Attention-25", function=_of_evaluator(nodes.attention_25, _refuse_scale), convention="onnx_25", **ATTENTION
    ),
    _target(
        "Attention-23, qk_matmul_output",
        "dot_product_attention",
        _of_evaluator(nodes.attention_scores, _refuse_scores),
        example=nodes.scores_example,
        convention="onnx_23",
    ),
    _target("Attention-25, past and present", "cached", _of_evaluator(nodes.attention_present, _refuse_scale)),
    _target("RotaryEmbedding", "rotary", _of_evaluator(nodes.rotary)),
    _target("RotaryEmbedding, position_ids", "rotary", _of_evaluator(nodes.rotary, positions=True)),
    _target("LayerNormalization", "layer_norm", _of_evaluator(nodes.layer_norm, OF_LAYER), arithmetic=SUMS),
    _target("RMSNormalization", "rms_norm", _of_evaluator(nodes.rms_norm, OF_LAST), arithmetic=SUMS),
    _target("GroupNormalization", "group_norm", _of_evaluator(nodes.group_norm, OF_GROUP), arithmetic=SUMS),
    _target(
        "BatchNormalization, training",
        "batch_norm",
        _of_evaluator(nodes.batch_norm_train, OF_CHANNEL),
        arithmetic=SUMS,
        dtypes=EVERY_DTYPE[1:],
    ),
    _target(
        "BatchNormalization, inference",
        "batch_norm",
        _of_evaluator(nodes.batch_norm_eval),
        dtypes=EVERY_DTYPE[1:],
    ),
    _target(
        "BatchNormalization, an epsilon of float32",
        "batch_norm",
        _of_evaluator(nodes.batch_norm),
        example=nodes.batch_norm_example,
        dtypes=("float64",),
    ),
    _target("Softmax", "softmax", _of_evaluator(nodes.softmax, OF_AXIS), arithmetic=SUMS),
    _target("LogSoftmax", "log_softmax", _of_evaluator(nodes.log_softmax, _refuse_spread), arithmetic=SUMS),
    _target("ReduceLogSumExp", "logsumexp", _of_evaluator(nodes.logsumexp, OF_AXIS), arithmetic=SUMS),
    _target("Gemm", "linear", _of_evaluator(nodes.gemm)),
    _target("MatMul", "linear", _of_evaluator(nodes.matmul)),
    _target("Conv", "conv", _of_evaluator(nodes.conv)),
    _target("MaxPool", "max_pool", _of_evaluator(nodes.max_pool, _refuse_pads)),
    _target("AveragePool", "average_pool", _of_evaluator(nodes.average_pool), arithmetic=SUMS),
    _target(
        "Resize, linear",
        "bilinear_resize",
        _of_evaluator(nodes.bilinear_resize, _refuse_quotients),
        example=bilinear_example,
    ),
    _target("RNN, GRU, LSTM", "recurrent", _of_evaluator(nodes.recurrent, _refuse_lengths)),
)
