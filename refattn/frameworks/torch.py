"""PyTorch: tensors in and out, gradients by autograd, and what of it is cross-checked.

A target is a function called like the reference's forward, but with tensors. Adding one is adding a row to TARGETS.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from refattn.attention.dot_product import multi_head
from refattn.attention.dot_product import transformer_decoder_layer as decoder_layer
from refattn.attention.dot_product import transformer_encoder_layer as encoder_layer
from refattn.core import Call, leaves, tree_map
from refattn.frameworks import Target, _flex
from refattn.frameworks._examples import bilinear_resize as bilinear_example
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.oracle.contract import Departure, NotHandled
from refattn.primitives.gru_cell import Params as gru_cell_reference
from refattn.primitives.lstm_cell import Params as lstm_cell_reference

VERSION = torch.__version__
# Formats that NumPy has by ml_dtypes, which torch does not know, and what has their bits.
OF_ML_DTYPES = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}


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
    if x.dtype.name in OF_ML_DTYPES:
        return torch.from_numpy(x.view(OF_ML_DTYPES[x.dtype.name])).view(getattr(torch, x.dtype.name))
    return torch.from_numpy(x)


def _differentiable(y, d):
    return isinstance(y, torch.Tensor) and y.requires_grad and y.shape == d.shape and y.dtype == _tensor(d).dtype


def _array(x):
    name = None if x is None else str(x.dtype).removeprefix("torch.")
    if name not in OF_ML_DTYPES:
        return None if x is None else x.numpy()
    import ml_dtypes

    bits = x.contiguous().view(getattr(torch, np.dtype(OF_ML_DTYPES[name]).name))
    return bits.numpy().view(getattr(ml_dtypes, name))


def departs(when, finding, words):
    """For an adapter: where this is so, the framework is known to depart."""
    if when:
        raise Departure(finding, words)


class Given(nn.Module):
    """For an adapter: in the place of a layer, what it gives, so that what it was made of can have gradients apart."""

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, _):
        return self.y


# --- the targets ---------------------------------------------------------------------------------------------


def linear(x, params):
    return F.linear(x, params.weight, params.bias)


def conv(x, params, *, stride, padding, dilation, groups):
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    refuse_convolution(x, params.weight, stride, padding, dilation)
    return function(x, params.weight, params.bias, stride, padding, dilation, groups)


def refuse_convolution(x, weight, stride, padding, dilation):
    """What oneDNN does wrong in 16 bits."""
    if x.dtype not in LOW:
        return
    per_axis = (n if isinstance(n, tuple) else (n,) * (x.ndim - 2) for n in (stride, padding, dilation))
    axes = [_Axis(*axis) for axis in zip(x.shape[2:], weight.shape[2:], *per_axis)]
    words = "windows of padding alone, dilated: in 16 bits torch 2.13 crashes"
    departs(any(axis.dilation > 1 and not _seen(axis) for axis in axes), "torch-conv-16-bit-crash", words)
    words = "a gradient of what is multiplied by padding alone: in bfloat16 torch 2.13 leaves in it what was in memory"
    unseen = len(_seen(axes[-1])) < axes[-1].kernel and axes[-1].stride > 1
    departs(x.dtype == torch.bfloat16 and unseen, "torch-conv-bf16-uninitialised", words)


class _Axis(NamedTuple):
    length: int
    kernel: int
    stride: int
    padding: int
    dilation: int


def _seen(axis):
    """Which places of the kernel lie on a number of the image in some window."""
    windows = (axis.length + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1) // axis.stride + 1
    starts = [axis.stride * i - axis.padding for i in range(windows)]
    return {j for j in range(axis.kernel) for start in starts if 0 <= start + axis.dilation * j < axis.length}


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
    out = torch.logsumexp(s, axis, keepdims)
    words = "torch 2.13's gradient is exp(s - y) of the y that was rounded"
    departs((out.abs() >= 16).any(), "torch-logsumexp-gradient", words)
    return out


def max_pool(x, *, kernel, stride, padding, dilation):
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise NotHandled("padding of more than half a kernel")
    function = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.ndim]
    return function(x, kernel, stride, padding, dilation)


def average_pool(x, *, kernel, stride, padding, count_include_pad):
    if any(2 * p > k for p, k in zip(padding, kernel)):
        raise NotHandled("padding of more than half a kernel")
    if x.ndim == 5 and x.dtype in LOW:
        raise NotHandled("torch 2.13 has no avg_pool3d of 16 bits on the CPU")
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
    _refuse_what_departs(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def scaled_dot_product_causal(q, k, v, *, scale, is_causal):
    if not is_causal:
        raise NotHandled("not causal")
    _refuse_what_departs(q, k, v, scale, is_causal=True)
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
    if mask is None:
        _refuse_what_departs(q, k, v, scale, is_causal)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=is_causal, enable_gqa=True)


def dot_product_math(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None):
    """What is written out: in float32 for what is narrower, and rounded once."""
    with sdpa_kernel(SDPBackend.MATH):
        return _dot_product(q, k, v, attn_bias, attn_mask, is_causal, scale)


def dot_product(q, k, v, attn_bias=None, *, attn_mask=None, scale=None):
    """By the kernel that torch takes unless it is told."""
    if attn_bias is None and attn_mask is None:
        _refuse_what_departs(q, k, v, scale)
    return _dot_product(q, k, v, attn_bias, attn_mask, False, scale)


def dot_product_causal(q, k, v, *, is_causal=False, scale=None):
    if not is_causal:
        raise NotHandled("not causal")
    if q.shape[-1] != v.shape[-1]:
        raise NotHandled("values of another width: torch falls back to what is written out, a row of its own")
    _refuse_what_departs(q, k, v, scale, is_causal=True)
    return _dot_product(q, k, v, None, None, True, scale)


def _dot_product(q, k, v, attn_bias, attn_mask, is_causal, scale):
    given = [name for name, x in (("bias", attn_bias is not None), ("mask", attn_mask is not None)) if x]
    given += ["causal"] * is_causal
    if len(given) > 1:
        raise NotHandled("a bias, a mask and causal: torch takes one of the three")
    mask = attn_mask if attn_bias is None else attn_bias
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def dot_product_on(device, backend):
    """One backend of a device, which refuses more than others do; results come back to the CPU, gradients too."""

    def attend(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None):
        there = [None if x is None else x.to(device) for x in (q, k, v, attn_bias, attn_mask)]
        try:
            with sdpa_kernel(backend):
                return _dot_product(*there, is_causal, scale).cpu()
        except RuntimeError as error:
            if str(error).startswith(("No available kernel", "No viable backend")):
                raise NotHandled(f"{backend.name} has no kernel for it") from error
            raise

    return attend


def _refuse_what_departs(q, k, v, scale, is_causal=False):
    """What the fused kernel of the CPU, which torch takes for four axes and values of the same width, does wrong."""
    if q.ndim != 4 or q.shape[-1] != v.shape[-1]:
        return
    words = "causal with a scale of 0 or less: torch 2.13's fused kernel gives NaN"
    hidden = is_causal and k.shape[2] > 1
    departs(hidden and scale is not None and scale <= 0, "torch-causal-nonpositive-scale", words)
    if k.shape[2] < _vector(q.dtype) and (q.isnan().any() or k.isnan().any()):
        nan = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).isnan()
        alone = (nan | ~torch.ones_like(nan).tril() if is_causal else nan).all(-1)
        departs(alone.any(), "torch-nan-query-row", "NaN alone, in few keys: torch 2.13's fused kernel makes 0 of it")


def _vector(dtype):
    """How many logits the fused kernel has in one register."""
    width = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
    return width // (8 if dtype == torch.float64 else 4)


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
    masks = _multi_head_masks(q, k, heads, mask, key_mask, is_causal)
    return _multi_head(q, k, v, params, heads, add_zero_attn, masks)


def multi_head_attention_causal(q, k, v, params, *, heads, is_causal, add_zero_attn):
    """By its own is_causal, which wants the mask too."""
    if not is_causal:
        raise NotHandled("not causal")
    words = "causal by name: torch 2.13 hides tokens that it adds itself"
    departs(add_zero_attn or params.bias_k is not None, "torch-mha-causal-extra-tokens", words)
    masks = _multi_head_masks(q, k, heads, None, None, True) | {"is_causal": True}
    masks["attn_mask"] = masks["attn_mask"][0]
    return _multi_head(q, k, v, params, heads, add_zero_attn, masks)


def multi_head_attention_weights(q, k, v, params, *, heads, mask, key_mask, is_causal, add_zero_attn):
    """As it is by default, where it returns the weights, too."""
    masks = _multi_head_masks(q, k, heads, mask, key_mask, is_causal)
    if not add_zero_attn and params.bias_k is None:
        _refuse_rows_without_keys(masks, heads)
    return _multi_head(q, k, v, params, heads, add_zero_attn, masks | {"need_weights": True})


# What is_causal does without a mask, which is nothing here, is on the page torch-mha-inference-causal; here it has one.
def multi_head_attention_inference(q, k, v, params, *, heads, mask, key_mask, is_causal):
    """Without gradients and with an even number of heads it is another kernel, if it is self-attention."""
    masks = _multi_head_masks(q, k, heads, mask, key_mask, is_causal)
    _refuse_rows_without_keys(masks, heads)
    assert torch.equal(q, k) and torch.equal(q, v)
    return _multi_head(q, q, q, params, heads, False, masks, training=False)


def _multi_head(q, k, v, params, heads, add_zero_attn, masks, training=True):
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
    return functional_call(module.train(training), weights, (q, k, v), masks)[0]


def _multi_head_masks(q, k, heads, mask, key_mask, is_causal):
    allowed = torch.ones(q.shape[0], heads, q.shape[1], k.shape[1], dtype=torch.bool) if mask is None else mask
    if is_causal:
        allowed = allowed.tril()
    return {
        "attn_mask": None if mask is None and not is_causal else ~allowed.flatten(0, 1),
        "key_padding_mask": None if key_mask is None else ~key_mask,
        "need_weights": False,
    }


WITHOUT_KEYS = "a query without keys: NaN, where torch 2.13 has 0 by its other path"


def _refuse_rows_without_keys(masks, heads):
    masked = torch.zeros(1, 1, 1, dtype=torch.bool)
    if masks["attn_mask"] is not None:
        masked = masked | masks["attn_mask"]
    if masks["key_padding_mask"] is not None:
        masked = masked | masks["key_padding_mask"].repeat_interleave(heads, 0)[:, None]
    departs(masked.all(-1).any(), "torch-mha-weights-nan", WITHOUT_KEYS)


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


def self_attention_example(draw):
    """An even number of heads, one array in three places."""
    heads, b, length = draw.choice("heads", 2, 4), draw.size("B"), draw.size("Q")
    features = heads * draw.size("E / heads")
    x, params = draw.array(b, length, features), draw.like(multi_head.init(draw.rng, features, bias=True))
    kind = draw.choice("masked", "not", "mask", "key_mask", "causal")
    options = {
        "heads": heads,
        "mask": draw.mask(b, heads, length, length) if kind == "mask" else None,
        "key_mask": draw.mask(b, length) if kind == "key_mask" else None,
        "is_causal": kind == "causal",
    }
    return Call((x, x, x, params), options)


def transformer_encoder_layer(x, params, *, heads, norm_first, activation, key_mask, is_causal, eps):
    kind, weights = _layer(nn.TransformerEncoderLayer, params, heads, norm_first, activation, eps)
    masks = {
        "src_mask": torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if is_causal else None,
        "src_key_padding_mask": None if key_mask is None else ~key_mask,
        "is_causal": is_causal,
    }
    return functional_call(kind, weights, (x,), masks)


def transformer_encoder_layer_inference(x, params, *, heads, norm_first, activation, key_mask, is_causal, eps):
    """Without gradients and with an even number of heads it is another kernel."""
    kind, weights = _layer(nn.TransformerEncoderLayer, params, heads, norm_first, activation, eps)
    if is_causal and key_mask is not None:
        raise NotHandled("causal, and padding")
    departs(key_mask is not None and not key_mask.any(-1).all(), "torch-mha-weights-nan", WITHOUT_KEYS)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if is_causal else None
    masks = {"src_mask": mask, "src_key_padding_mask": None if key_mask is None else ~key_mask}
    return functional_call(kind.eval(), weights, (x,), masks)


def transformer_decoder_layer(
    x, memory, params, *, heads, norm_first, activation, key_mask, memory_mask, is_causal, eps
):
    kind, weights = _layer(nn.TransformerDecoderLayer, params, heads, norm_first, activation, eps)
    masks = {
        "tgt_mask": torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if is_causal else None,
        "tgt_key_padding_mask": None if key_mask is None else ~key_mask,
        "memory_key_padding_mask": None if memory_mask is None else ~memory_mask,
        "tgt_is_causal": is_causal,
    }
    return functional_call(kind, weights, (x, memory), masks)


def _layer(kind, params, heads, norm_first, activation, eps):
    """The module, and its weights by torch's names."""
    if activation not in ("relu", "gelu"):
        raise NotHandled(f"activation {activation}")
    parts = params._asdict()
    weights = {f"self_attn.{name}": w for name, w in _attention_weights(parts.pop("attention")).items()}
    if "cross_attention" in parts:
        cross = _attention_weights(parts.pop("cross_attention"))
        weights |= {f"multihead_attn.{name}": w for name, w in cross.items()}
    for name, part in parts.pop("feed_forward")._asdict().items() | parts.items():
        weights |= {f"{name}.{kind}": w for kind, w in zip(("weight", "bias"), part) if w is not None}
    hidden, features = weights["linear1.weight"].shape
    options = {"activation": activation, "layer_norm_eps": eps, "norm_first": norm_first}
    options |= {"dropout": 0, "batch_first": True, "bias": "linear1.bias" in weights}
    return kind(features, heads, hidden, **options), weights


def encoder_inference_example(draw):
    """An even number of heads, norms of both sides, all biases: what torch has another kernel for."""
    heads, b, t, hidden = 2, draw.size("B", high=2), draw.size("T", high=3), draw.size("M", high=3)
    params = encoder_layer.init(draw.rng, heads * draw.size("D / heads", high=3), hidden, bias=True)
    kind = draw.choice("masked", "not", "key_mask", "causal")
    options = {
        "heads": heads,
        "norm_first": draw.choice("norm_first", False, True),
        "activation": draw.choice("activation", "relu", "gelu"),
        "key_mask": draw.mask(b, t) if kind == "key_mask" else None,
        "is_causal": kind == "causal",
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    return Call((draw.array(b, t, len(params.norm1.gamma)), draw.like(params)), options)


def decoder_example(draw):
    """As the reference's own, but with as many features in the memory as in the tokens."""
    call = decoder_layer.example(draw)
    x, memory, params = call.args
    bias = params.norm1.beta is not None
    params = decoder_layer.init(draw.rng, x.shape[-1], len(params.feed_forward.linear1.weight), bias=bias)
    return Call((x, draw.array(*memory.shape[:2], x.shape[-1]), draw.like(params)), call.options)


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"
LOW = torch.bfloat16, torch.float16
# What the fused kernel does in 16 bits is on two pages: torch-exp-of-zero-16bit and torch-bf16-running-sums.
FUSED = {form: f"torch_cpu_{form}" for form in EVERY_DTYPE[1:]}
# In 16 bits nobody told: one operation after the other, each result stored (OF_DTYPE). Of the others,
# UPCAST is computed in float32 and rounded once. Products are oneDNN's or mkl's, with sums of float32;
# vec_batch_norm_cpu of inference, upsample_bilinear2d and rms_norm (a composite, in float32) convert what they read.
UPCAST = {"bfloat16": "bf16_upcast", "float16": "f16_upcast"}
# SUMS are kept in 16 bits, too: docs/findings/torch-16-bit-sums.md shows each of them.
SUMS = {
    eager.out.name: eager._replace(name=f"{eager.name}, sums too", accumulator=eager.out)
    for eager in (ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"])
}
# Convolutions keep them in 16 bits where oneDNN has no kernels for this CPU: docs/findings/torch-conv-16-bit-sums.md.
CONV_SUMS = {
    form: SUMS[form]
    for form, has_kernels in (("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported"))
    if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, has_kernels)())
}
# FlexAttention computes scores and softmax in float32 without a compiler, and casts p before its product with v.
FLEX = {
    flash.out.name: flash._replace(name=f"{flash.name}, p normalised", probs_normalised=True)
    for flash in (ARITHMETICS["bf16_flash"], ARITHMETICS["f16_flash"])
}
DOT_PRODUCT = {"convention": "torch_sdpa", "times": 4}


def _target(*row, **options):
    return Target(*row, **{"dtypes": EVERY_DTYPE} | options)


def cuda_targets(device="cuda"):
    """Promises of kernels that nobody has measured yet: P and dS are cast, tensor cores truncate what they add."""
    flash = {form: ARITHMETICS[f"{short}_flash"] for form, short in (("bfloat16", "bf16"), ("float16", "f16"))}
    fused = {form: a._replace(name=f"{a.name}, truncated", accumulator_truncates=True) for form, a in flash.items()}
    every = {"MATH": UPCAST, "EFFICIENT_ATTENTION": fused, "FLASH_ATTENTION": fused, "CUDNN_ATTENTION": fused}
    low = "bfloat16", "float16"
    dtypes = {"MATH": EVERY_DTYPE, "EFFICIENT_ATTENTION": ("float32", *low)}
    return tuple(
        Target(
            *(f"scaled_dot_product_attention, {device}, {name}", "dot_product_attention"),
            dot_product_on(device, getattr(SDPBackend, name)),
            **DOT_PRODUCT,
            dtypes=dtypes.get(name, low),
            arithmetic=arithmetic,
            device=device,
        )
        for name, arithmetic in every.items()
    )


TARGETS = (
    _target("scaled_dot_product_attention", "scaled_dot_product", scaled_dot_product, arithmetic=FUSED),
    _target("scaled_dot_product_attention, causal", "scaled_dot_product", scaled_dot_product_causal, arithmetic=FUSED),
    _target("scaled_dot_product_attention, mask", "scaled_dot_product", scaled_dot_product_masked, arithmetic=FUSED),
    _target("scaled_dot_product_attention, enable_gqa", "grouped_query", grouped_query, arithmetic=FUSED),
    _target(
        *("scaled_dot_product_attention, options, math", "dot_product_attention", dot_product_math),
        arithmetic=UPCAST,
        **DOT_PRODUCT,
    ),
    _target(
        *("scaled_dot_product_attention, options", "dot_product_attention", dot_product),
        arithmetic=FUSED,
        **DOT_PRODUCT,
    ),
    _target(
        *("scaled_dot_product_attention, options, causal", "dot_product_attention", dot_product_causal),
        arithmetic=FUSED,
        times=3,
    ),
    _target(
        *("scaled_dot_product_attention, compiled", "scaled_dot_product", _flex.compiled, _flex.compiled_example),
        arithmetic=FUSED,
        lacks=_flex.lacks_compiler,
    ),
    _target(
        *("flex_attention", "dot_product_attention", _flex.flex),
        dtypes=("float32", "bfloat16"),  # a call takes a third of a second
        arithmetic=FLEX,
        convention="torch_flex",
        gradients=False,
    ),
    _target(
        *("flex_attention, compiled", "dot_product_attention", _flex.compiled_flex, _flex.flex_example),
        dtypes=("float32", "bfloat16"),  # and it takes ten seconds to compile it
        arithmetic=FUSED,
        convention="torch_flex",
        gradients=False,
        lacks=_flex.lacks_compiler,
    ),
    _target("nn.MultiheadAttention", "multi_head", multi_head_attention, multi_head_example),
    _target("nn.MultiheadAttention, is_causal", "multi_head", multi_head_attention_causal, multi_head_example),
    _target("nn.MultiheadAttention, weights", "multi_head", multi_head_attention_weights, multi_head_example),
    _target(
        *("nn.MultiheadAttention, inference", "multi_head", multi_head_attention_inference, self_attention_example),
        gradients=False,
    ),
    _target("nn.TransformerEncoderLayer", "transformer_encoder_layer", transformer_encoder_layer, arithmetic=SUMS),
    _target(
        *("nn.TransformerEncoderLayer, inference", "transformer_encoder_layer", transformer_encoder_layer_inference),
        encoder_inference_example,
        gradients=False,
    ),
    _target(
        *("nn.TransformerDecoderLayer", "transformer_decoder_layer", transformer_decoder_layer, decoder_example),
        arithmetic=SUMS,
    ),
    _target("nn.RNN, nn.GRU, nn.LSTM", "recurrent", recurrent),
    _target("nn.RNNCell", "rnn_cell", rnn_cell),
    _target("nn.GRUCell", "gru_cell", gru_cell),
    _target("nn.LSTMCell", "lstm_cell", lstm_cell),
    _target("linear", "linear", linear, arithmetic=UPCAST),
    _target("conv1d, conv2d, conv3d", "conv", conv, arithmetic=UPCAST | CONV_SUMS),
    _target("batch_norm, training", "batch_norm", batch_norm_train),
    _target("batch_norm, inference", "batch_norm", batch_norm_eval, arithmetic=UPCAST),
    _target("layer_norm", "layer_norm", layer_norm, arithmetic=SUMS),
    _target("group_norm", "group_norm", group_norm),
    _target("rms_norm", "rms_norm", rms_norm, arithmetic=UPCAST),
    _target("softmax", "softmax", softmax),
    _target("log_softmax", "log_softmax", log_softmax),
    _target("logsumexp", "logsumexp", logsumexp),
    _target("max_pool", "max_pool", max_pool, arithmetic=SUMS),
    _target("avg_pool", "average_pool", average_pool, arithmetic=SUMS),
    _target("adaptive_avg_pool", "adaptive_average_pool", adaptive_average_pool, arithmetic=SUMS),
    _target("adaptive_max_pool", "adaptive_max_pool", adaptive_max_pool, arithmetic=SUMS),
    _target("interpolate, bilinear", "bilinear_resize", bilinear_resize, bilinear_example, arithmetic=UPCAST),
    _target("embedding", "embedding", embedding, arithmetic=SUMS),
)
if torch.cuda.is_available():
    TARGETS += cuda_targets()
