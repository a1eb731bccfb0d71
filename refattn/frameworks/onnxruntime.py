"""ONNX Runtime, on the CPU: NumPy arrays in and out, no gradients.

A target is a function called like the reference's forward, with NumPy's arrays; it runs a model of one node.
bfloat16 is not here: most operators have no kernel for it on the CPU, and no output of it comes back as an array
(1.32: "No corresponding Numpy type").
"""

import functools

import numpy as np
import onnxruntime

from refattn.attention.dot_product import multi_head as multi_head_reference
from refattn.core import Call, tree_map
from refattn.frameworks import Target
from refattn.frameworks import _onnx_nodes as nodes
from refattn.frameworks._examples import bilinear_resize as bilinear_example
from refattn.frameworks.onnx import run
from refattn.oracle.contract import Departure, NotHandled
from refattn.oracle.conventions import PRESETS
from refattn.primitives import linear, rnn_cell
from refattn.primitives import recurrent as recurrent_reference

__all__ = ["TARGETS", "VERSION", "run"]
VERSION = onnxruntime.__version__


def _session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)


_of_session = functools.partial(nodes.candidate, _session)


# --- what it does otherwise, or not at all ------------------------------------------------------------------------


def _refuse_scale(q, *args, scale=None, **options):
    """A root that float32 holds is that of 1/4 alone, among those that are drawn."""
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    if q.dtype == np.float64 and float(np.sqrt(np.float32(scale))) ** 2 != scale:
        words = "Attention of ONNX Runtime 1.32 takes the square root of the scale in float32, in float64 too"
        raise Departure("onnxruntime-attention-scale-root", words)


def _refuse_one_query(q, k, v, *args, is_causal=False, q_offset=None, **options):
    _refuse_scale(q, k, v, *args, **options)
    past, _ = nodes.past(q, k, v, q_offset if is_causal else None)
    if past is not None and q.shape[2] == 1 and q.dtype != np.float64 and k.shape[2] - past.shape[2] > 1:
        words = "Attention-23 of ONNX Runtime 1.32, causal, with a past: a single query sees the keys behind it"
        raise Departure("onnxruntime-attention-one-query", words)


def _refuse_masked_scores(q, *args, return_scores, attn_mask=None, is_causal=False, **options):
    _refuse_scale(q, *args, **options)
    if return_scores == "biased" and (attn_mask is not None or is_causal):
        words = "what is masked has the lowest float32 in the scores of ONNX Runtime 1.32's Attention, not -inf"
        raise Departure("onnxruntime-attention-masked-scores", words)


def _refuse_unidirectional(q, k, v, attn_bias=None, *, is_causal=False, q_offset=None, **hiding):
    if not is_causal:
        return
    past, _ = nodes.past(q, k, v, q_offset)
    first = 0 if past is None else past.shape[2]
    if k.shape[2] - first > q.shape[2]:
        words = "unidirectional in MultiHeadAttention of ONNX Runtime 1.32: with more keys the last query sees all"
        raise Departure("onnxruntime-mha-unidirectional", words)
    if _empty_rows(q, k, np.arange(q.shape[2]) + first, **hiding):
        words = (
            "unidirectional in MultiHeadAttention of ONNX Runtime 1.32: a query whose keys are masked sees later ones"
        )
        raise Departure("onnxruntime-mha-masked-rows", words)


def _refuse_rows(q, k, v, attn_bias=None, sinks=None, *, softcap=None, window=None, **hiding):
    """What is given for rows without numbers depends on which of its kernels runs."""
    if hiding.get("attn_mask") is not None and np.isnan(k).any():
        raise NotHandled("NaN in a key behind a mask: it is a bias here, which is added, where causal replaces")
    if np.isnan(v).any():
        raise NotHandled("NaN in a value: some of its kernels multiply what is hidden by 0, others skip it")
    if softcap is None and sinks is None and np.isnan(q).any():
        words = "GroupQueryAttention of ONNX Runtime 1.32 makes 0 of a query of NaN, where later keys are hidden"
        raise Departure("onnxruntime-gqa-nan-query", words)
    filled = hiding.get("kv_seqlens")
    filled = np.array([k.shape[2]]) if filled is None else filled
    last = (filled[:, None] - q.shape[2] + np.arange(q.shape[2]))[:, None]  # (B, 1, Q)
    left = None if window is None else window[0]
    apart = softcap is not None or k.shape[2] == 1 or q.dtype == np.float16
    if apart and sinks is None and _empty_rows(q, k, last, left=left, **hiding):
        words = (
            "GroupQueryAttention of ONNX Runtime 1.32: a masked row is 0; NaN in float16, with a soft cap, or one key"
        )
        raise Departure("onnxruntime-gqa-masked-rows", words)


def _empty_rows(q, k, last, *, attn_mask=None, kv_seqlens=None, left=None, **options):
    """Whether some query, which sees no key behind `last`, sees none."""
    keys = np.arange(k.shape[2])
    seen = keys <= last[..., None]
    if left is not None:
        seen = seen & (keys >= last[..., None] - left)
    if attn_mask is not None:
        seen = seen & attn_mask
    if kv_seqlens is not None:
        seen = seen & (keys < kv_seqlens[:, None, None, None])
    return not seen.any(axis=-1).all()


def rnn(x, state, params, *, direction, mask=None):
    """The kernel's tanh is off by 1e-7 everywhere, so that small numbers have few digits."""
    if type(params.cells[0]) is not rnn_cell.Params:
        raise NotHandled("GRU and LSTM: a target of their own")
    y, final = nodes.recurrent(_session, x, state, params, direction=direction, mask=mask)
    if ((y != 0) & (np.abs(y) < 0.25)).any():
        words = "tanh in RNN of ONNX Runtime 1.32 is off by 7e-8, of the smallest numbers too"
        raise Departure("onnxruntime-rnn-tanh", words)
    return y, final


def rnn_example(draw):
    """One layer, of numbers so large that few results are small."""
    n, t, inputs, hidden = draw.size("N", high=2), draw.size("T", high=3), draw.size("I"), draw.size("H", high=2)
    direction, bias = draw.choice("direction", "forward", "backward", "both"), draw.choice("bias", True, False)
    params = recurrent_reference.init(draw.rng, inputs, hidden, cell="rnn", direction=direction, bias=bias)
    state = recurrent_reference.State(draw.array(n, len(params.cells), hidden)) if draw.choice("state", 1, 0) else None
    mask = np.arange(t) < draw.integers(1, t, n)[:, None] if draw.choice("masked", True, False) else None
    args = draw.array(n, t, inputs), state, draw.like(params)
    return Call(tree_map(lambda a: 2 * a, args), {"direction": direction, "mask": mask})


def gru_lstm(x, state, params, *, direction, mask=None, reset_after=True):
    if type(params.cells[0]) is rnn_cell.Params:
        raise NotHandled("RNN: a target of its own")
    return nodes.recurrent(_session, x, state, params, direction=direction, mask=mask, reset_after=reset_after)


def _refuse_padding(x, *, kernel, padding, **options):
    if any(p >= k for p, k in zip(padding, kernel)):
        raise NotHandled("padding of a kernel or more")


def contrib_attention(q, k, v, params, *, heads, mask=None, key_mask=None, is_causal=False):
    """com.microsoft.Attention has the projections of queries, keys and values in one matrix, and none behind them."""
    return nodes.self_attention(_session, q, params, heads, mask, key_mask, is_causal)


def contrib_attention_example(draw):
    """Self-attention without a last projection, in which every query sees the first key."""
    heads = draw.choice("heads", 1, 2, 3)
    compared, passed = heads * draw.size("P / heads"), heads * draw.size("V / heads")
    b, tokens, features = draw.size("B", high=2), draw.size("T", high=8), draw.size("E")
    bias = draw.choice("bias", True, False)
    parts = [linear.init(draw.rng, features, width, bias) for width in (compared, compared, passed)]
    mask = draw.mask(b, heads, tokens, tokens) if draw.choice("masked", False, True) else None
    key_mask = draw.mask(b, tokens) if draw.choice("padded", False, True) else None
    for given in (mask, key_mask):
        if given is not None:
            given[..., 0] = True
    causal = draw.choice("is_causal", False, True)
    x = draw.array(b, tokens, features)
    options = {"heads": heads, "mask": mask, "key_mask": key_mask, "is_causal": causal}
    return Call((x, x, x, draw.like(multi_head_reference.Params(*parts))), options)


# --- the targets ------------------------------------------------------------------------------------------------


# Where an operator has no kernel of float16, ONNX Runtime casts to float32 and back (InsertCastTransformer), also for
# all of Attention-25, which is a function of other operators. Attention-23 and 24 have a kernel of float16: eager.
UPCAST = {"float16": "f16_upcast"}
EAGER = {"float32": "onnxruntime_cpu_float32", "float16": "onnxruntime_cpu_float16"}


def _target(name, like, function, **more):
    usual = {"dtypes": ("float64", "float32", "float16"), "arithmetic": UPCAST, "gradients": False}
    return Target(name, like, function, **usual | more)


NARROW = {"dtypes": ("float32", "float16")}  # there is no kernel of float64
ATTENTION = {"like": "dot_product_attention", "convention": "ort_attention", "times": 4}
CONTRIB = ATTENTION | NARROW

TARGETS = (
    _target("Attention-23", function=_of_session(nodes.attention_23, _refuse_one_query), arithmetic=EAGER, **ATTENTION),
    _target(
        "Attention-23, packed",
        function=_of_session(nodes.attention_23, _refuse_one_query, packed=True),
        arithmetic=EAGER,
        **ATTENTION,
    ),
    _target(
        "Attention-24, nonpad_kv_seqlen",
        function=_of_session(nodes.attention_of_cache, _refuse_scale),
        arithmetic=EAGER,
        **ATTENTION | {"convention": PRESETS["ort_attention"]._replace(q_offset="bottom_right")},
    ),
    _target("Attention-25", function=_of_session(nodes.attention_25, _refuse_scale), **ATTENTION),
    _target(
        "Attention-23, qk_matmul_output",
        "dot_product_attention",
        _of_session(nodes.attention_scores, _refuse_masked_scores),
        example=nodes.scores_example,
        arithmetic=EAGER,
        convention="ort_attention",
    ),
    _target("Attention-25, past and present", "cached", _of_session(nodes.attention_present, _refuse_scale)),
    _target(
        "com.microsoft.MultiHeadAttention",
        function=_of_session(nodes.multi_head, _refuse_unidirectional),
        **CONTRIB | {"convention": "ort_mha"},
    ),
    _target(
        "com.microsoft.GroupQueryAttention",
        function=_of_session(nodes.grouped_query, _refuse_rows),
        **CONTRIB | {"convention": "ort_gqa"},
    ),
    _target("com.microsoft.Attention", "multi_head", contrib_attention, example=contrib_attention_example, **NARROW),
    _target("com.microsoft.RotaryEmbedding", "rotary", _of_session(nodes.rotary, contrib=True), **NARROW),
    _target("RotaryEmbedding", "rotary", _of_session(nodes.rotary), **NARROW),
    _target("RotaryEmbedding, position_ids", "rotary", _of_session(nodes.rotary, positions=True), **NARROW),
    _target("LayerNormalization", "layer_norm", _of_session(nodes.layer_norm)),
    _target("RMSNormalization", "rms_norm", _of_session(nodes.rms_norm)),
    _target("GroupNormalization", "group_norm", _of_session(nodes.group_norm)),
    _target("BatchNormalization, training", "batch_norm", _of_session(nodes.batch_norm_train), **NARROW),
    _target("BatchNormalization, inference", "batch_norm", _of_session(nodes.batch_norm_eval), **NARROW),
    _target(
        "BatchNormalization, an epsilon of float32",
        "batch_norm",
        _of_session(nodes.batch_norm),
        example=nodes.batch_norm_example,
        dtypes=("float64",),
    ),
    _target("Softmax", "softmax", _of_session(nodes.softmax)),
    _target("LogSoftmax", "log_softmax", _of_session(nodes.log_softmax)),
    _target("ReduceLogSumExp", "logsumexp", _of_session(nodes.logsumexp)),
    _target("Gemm", "linear", _of_session(nodes.gemm)),
    _target("MatMul", "linear", _of_session(nodes.matmul)),
    _target("Conv", "conv", _of_session(nodes.conv), **NARROW),
    _target("MaxPool", "max_pool", _of_session(nodes.max_pool, _refuse_padding)),
    _target("AveragePool", "average_pool", _of_session(nodes.average_pool), **NARROW),
    _target(
        "Resize, linear",
        "bilinear_resize",
        _of_session(nodes.bilinear_resize),
        example=bilinear_example,
        **NARROW,
    ),
    _target("GRU, LSTM", "recurrent", gru_lstm, **NARROW),
    _target("RNN", "recurrent", rnn, example=rnn_example, **NARROW),
)
