"""Keras, on whichever backend it was loaded with: what of it is cross-checked.

A target is a function called like the reference's forward, but with the backend's tensors. The weights of a layer are
given by stateless_call, so that gradients flow to them.
"""

import functools
from types import MappingProxyType

import keras
import numpy as np

from refattn.attention.dot_product import grouped_query_layer, multi_head
from refattn.attention.temporal import additive as additive_reference
from refattn.core import Call, leaves
from refattn.draw import RandomDraw
from refattn.frameworks import Target
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.oracle.contract import Departure, NotHandled
from refattn.oracle.inputs import Stretched
from refattn.primitives import average_pool as average_pool_reference
from refattn.primitives import conv as conv_reference
from refattn.primitives import gru_cell as gru_cell_reference
from refattn.primitives import linear
from refattn.primitives import max_pool as max_pool_reference
from refattn.primitives import recurrent as recurrent_reference
from refattn.primitives.lstm_cell import Params as lstm_cell_reference

BACKEND = keras.backend.backend()


def version(backend, its_version):
    """The VERSION of Keras on a backend; ImportError if it is on another one."""
    if backend != BACKEND:
        raise ImportError(f"keras is loaded already, on {BACKEND}, and it takes one backend in a process")
    return f"{keras.__version__}, {backend} {its_version}"


def _compiled(function):
    """On JAX one program: operations that are compiled one by one take ten times as long."""
    if BACKEND != "jax":
        return function
    import jax

    programs = {}

    @functools.wraps(function)
    def run(*args, **options):
        arrays = {name for name, x in options.items() if any(hasattr(y, "shape") for _, y in leaves(x))}
        static = tuple(sorted(options.keys() - arrays))
        if static not in programs:
            programs[static] = jax.jit(function, static_argnames=static)
        return programs[static](*args, **options)

    return run


def _call(layer, shapes, weights, *args, state=None, **options):
    """What a layer gives with these weights, and this state that is not trained; it makes none of its own."""
    with keras.StatelessScope(initialize_variables=False):
        layer.build(*([tuple(x) for x in shape] if isinstance(shape, list) else tuple(shape) for shape in shapes))
        if state is None:  # the seeds of what is not dropped
            state = [keras.ops.zeros(x.shape, x.dtype) for x in layer.non_trainable_variables]
        return layer.stateless_call(list(weights), list(state), *args, **options)[0]


def _dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def _refuse_bias_sum(bias, tokens):
    """A sum of two is rounded once, as it should be; of three, on the way."""
    if BACKEND == "tensorflow" and bias is not None and _dtype(bias) == "bfloat16" and tokens > 2:
        raise Departure("tensorflow-16-bit-sums", "tensorflow 2.21 sums the gradient of a bias in bfloat16")
    if BACKEND == "jax" and bias is not None and _dtype(bias) == "bfloat16" and tokens > 2:
        raise Departure("jax-16-bit-sums", "jax 0.10.2 sums the gradient of a bias in bfloat16")


# --- attention ------------------------------------------------------------------------------------------------


def dot_product_attention(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None):
    {"jax": _jax_lacks, "torch": _torch_lacks, "tensorflow": _tensorflow_lacks}[BACKEND](
        q, k, v, attn_bias, attn_mask, is_causal, scale
    )
    return _dot_product_attention(q, k, v, attn_bias, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


@_compiled
def _dot_product_attention(q, k, v, attn_bias, *, attn_mask, is_causal, scale):
    y = keras.ops.dot_product_attention(
        *(keras.ops.swapaxes(x, 1, 2) for x in (q, k, v)), attn_bias, attn_mask, scale=scale, is_causal=is_causal
    )
    return keras.ops.swapaxes(y, 1, 2)


def _jax_lacks(q, k, v, attn_bias, attn_mask, is_causal, scale):
    if k.shape[-1] != v.shape[-1]:
        raise NotHandled("values that are not shaped as the keys are, which Keras does not promise")


def _torch_lacks(q, k, v, attn_bias, attn_mask, is_causal, scale):
    from refattn.frameworks import torch

    if attn_bias is not None and (attn_mask is not None or is_causal):
        raise NotHandled("a bias with a mask or causal: on torch Keras takes one of them")
    if attn_mask is not None and _dtype(q) == "float16" and _empty_rows(q.shape, k.shape, is_causal, attn_mask):
        raise Departure("keras-torch-float16-masked-row", "nothing to attend to: in float16 keras 3.15.1 adds -45856")
    if attn_bias is None and attn_mask is None:
        torch._refuse_what_departs(q, k, v, scale, is_causal)


def _tensorflow_lacks(q, k, v, attn_bias, attn_mask, is_causal, scale):
    if k.shape[1] == 1 < q.shape[1]:
        raise Departure("keras-tensorflow-one-key-head", "one head of keys for many of queries: keras 3.15.1 raises")
    _refuse_rounded_scale(q, q.shape[-1] ** -0.5 if scale is None else scale)
    _refuse_nan(q, k)


def _refuse_rounded_scale(q, scale):
    if BACKEND == "tensorflow" and _dtype(q) == "float64" and float(np.float32(scale)) != scale:
        raise Departure("keras-tensorflow-float64-scale", "keras 3.15.1 rounds the scale of float64 to float32")


def _refuse_nan(*arrays):
    narrow = BACKEND == "tensorflow" and _dtype(arrays[0]) != "float64"
    if narrow and any(np.isnan(np.asarray(x, np.float32)).any() for x in arrays):
        raise Departure("tensorflow-softmax-nan", "NaN among logits: tensorflow 2.21's softmax has numbers beside it")


def _refuse_column(bias, tokens, heads, features):
    if BACKEND == "tensorflow" and bias is not None and features == 1 < heads == tokens:
        raise Departure("keras-tensorflow-add-column", "keras 3.15.1 adds a bias of (heads, 1) along as many tokens")


def multi_head_attention(q, k, v, params, *, heads, mask, key_mask, is_causal):
    """What is fused: a query that attends to nothing gets the mean of the values."""
    of_keys = None if key_mask is None else np.asarray(key_mask)[:, None, None]
    if _empty_rows(q.shape, k.shape, is_causal, mask, of_keys):
        raise Departure(
            "keras-fully-masked-row",
            "a query with nothing to attend to: keras 3.15.1 takes the mean of all values, and 0 if asked for scores",
        )
    if BACKEND == "jax" and params.k.weight.shape[0] != params.v.weight.shape[0]:
        raise Departure("keras-jax-value-dim", "a value_dim that is not key_dim: on jax keras 3.15.1 raises")
    return _multi_head(q, k, v, params, heads, mask, key_mask, is_causal, scores=False)


def multi_head_attention_scores(q, k, v, params, *, heads, mask, key_mask, is_causal):
    """What is written out, as it is where scores are asked for: such a query gets zeros."""
    return _multi_head(q, k, v, params, heads, mask, key_mask, is_causal, scores=True)


def _multi_head(q, k, v, params, heads, mask, key_mask, is_causal, scores):
    _refuse_what_departs(q, k, v, params, heads, heads)
    options = {"heads": heads, "is_causal": is_causal, "scores": scores}
    return _multi_head_layer(q, k, v, params, mask=mask, key_mask=key_mask, **options)


@_compiled
def _multi_head_layer(q, k, v, params, *, heads, mask, key_mask, is_causal, scores):
    of_keys, of_values = params.k.weight.shape[0] // heads, params.v.weight.shape[0] // heads
    options = {"use_bias": params.q.bias is not None, "output_shape": params.out.weight.shape[0], "dtype": _dtype(q)}
    layer = keras.layers.MultiHeadAttention(heads, of_keys, of_values, **options)
    shapes, weights = (q.shape, v.shape, k.shape), _attention_weights(params, heads, heads)
    masks = _attention_masks(mask, key_mask, is_causal)
    y = _call(layer, shapes, weights, q, v, k, return_attention_scores=scores, **masks)
    return y[0] if scores else y


def grouped_query_attention(q, k, v, params, *, heads, key_heads, mask, key_mask, is_causal):
    """What is written out, as it is where scores are asked for."""
    _refuse_what_departs(q, k, v, params, heads, key_heads)
    options = {"heads": heads, "key_heads": key_heads, "is_causal": is_causal}
    return _grouped_query_layer(q, k, v, params, mask=mask, key_mask=key_mask, **options)


@_compiled
def _grouped_query_layer(q, k, v, params, *, heads, key_heads, mask, key_mask, is_causal):
    options = {"use_bias": params.q.bias is not None, "dtype": _dtype(q)}
    layer = keras.layers.GroupQueryAttention(params.q.weight.shape[0] // heads, heads, key_heads, **options)
    shapes, weights = (q.shape, v.shape, k.shape), _attention_weights(params, heads, key_heads)
    masks = _attention_masks(mask, key_mask, is_causal)
    return _call(layer, shapes, weights, q, v, k, return_attention_scores=True, **masks)[0]


def _refuse_what_departs(q, k, v, params, heads, key_heads):
    of_queries, of_values = params.q.weight.shape[0] // heads, params.v.weight.shape[0] // key_heads
    _refuse_rounded_scale(q, of_queries**-0.5)
    for x, count, features in ((q, heads, of_queries), (k, key_heads, of_queries), (v, key_heads, of_values)):
        _refuse_column(params.q.bias, x.shape[1], count, features)
        _refuse_bias_sum(params.q.bias, x.shape[0] * x.shape[1])


def _attention_weights(params, heads, key_heads):
    """Keras' kernels are (inputs, heads, features of a head), the last one (heads, features of a head, outputs)."""
    weights = []
    for projection, count in zip(params[:3], (heads, key_heads, key_heads)):
        inputs = projection.weight.shape[1]
        weights.append(keras.ops.reshape(keras.ops.transpose(projection.weight), (inputs, count, -1)))
        if projection.bias is not None:
            weights.append(keras.ops.reshape(projection.bias, (count, -1)))
    outputs = params.out.weight.shape[0]
    weights.append(keras.ops.reshape(keras.ops.transpose(params.out.weight), (heads, -1, outputs)))
    return weights if params.out.bias is None else [*weights, params.out.bias]


def _attention_masks(mask, key_mask, is_causal):
    """A mask for every head does not go together with Keras' own of keys, which has no axis of heads."""
    if mask is not None and key_mask is not None:
        mask, key_mask = keras.ops.logical_and(mask, key_mask[:, None, None]), None
    return {"attention_mask": mask, "key_mask": key_mask, "use_causal_mask": is_causal}


def _empty_rows(of_queries, of_keys, is_causal, *masks):
    """Whether there is a query that attends to nothing; masks stretch to (B, H, Q, K)."""
    seen = np.ones((of_queries[0], 1, of_queries[-2], of_keys[-2]), bool)
    for mask in masks:
        seen = seen if mask is None else seen & np.asarray(mask)
    return not (np.tril(seen) if is_causal else seen).any(axis=-1).all()


def grouped_query_example(draw):
    """Biases for all or none, values as wide as keys, and as many features out as in."""
    key_heads, features = draw.choice("key_heads", 1, 2, 3), draw.size("D", high=3)
    heads = key_heads * draw.size("heads / key_heads", high=3)
    b, queries, keys = draw.size("B", high=2), draw.size("Q"), draw.size("K")
    e, f, g = (draw.size(letter, high=3) for letter in "EFG")
    bias = draw.choice("bias", True, False)
    inside, shared = heads * features, key_heads * features
    sizes = (e, inside), (f, shared), (g, shared), (inside, e)
    params = grouped_query_layer.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    options = {
        "heads": heads,
        "key_heads": key_heads,
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, keys) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    arrays = draw.array(b, queries, e), draw.array(b, keys, f), draw.array(b, keys, g)
    return Call((*arrays, draw.like(params)), options)


def multi_head_example(draw):
    """All four projections, biases for all or none."""
    heads = draw.choice("heads", 1, 2, 3)
    compared, passed = heads * draw.size("P / heads", high=3), heads * draw.size("V / heads", high=3)
    passed = draw.choice("V", compared, passed)
    b, queries, keys = draw.size("B", high=2), draw.size("Q"), draw.size("K")
    e, f, g, o = (draw.size(letter, high=3) for letter in "EFGO")
    bias = draw.choice("bias", True, False)
    sizes = (e, compared), (f, compared), (g, passed), (passed, o)
    params = multi_head.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    options = {
        "heads": heads,
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, keys) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    arrays = draw.array(b, queries, e), draw.array(b, keys, f), draw.array(b, keys, g)
    return Call((*arrays, draw.like(params)), options)


def attention(q, k, v, *, scale=None, is_causal=False, q_seqlens=None, kv_seqlens=None):
    """Heads are items here; the layer's masks are those of padding, and its scale is a weight."""
    if k.shape[1] != q.shape[1]:
        raise NotHandled("heads that share keys")
    _refuse_nan(q, k)
    if BACKEND == "torch" and _dtype(q) == "bfloat16" and any(x.isnan().any() for x in (q, k, v)):
        raise Departure("torch-amx-nan", "NaN in products of bfloat16: on AMX torch 2.13 lets it out into other rows")
    of_keys = None if kv_seqlens is None else _within(kv_seqlens, k)
    of_queries = None if q_seqlens is None else _within(q_seqlens, q)
    if _empty_rows(q.shape, k.shape, is_causal, None if of_keys is None else of_keys[:, None, None]):
        raise NotHandled("a query with nothing to attend to, which the layer's documentation rules out")
    masks = {"query_mask": of_queries, "key_mask": of_keys}
    return _attention(q, k, v, None if scale is None else np.float64(scale), is_causal=is_causal, **masks)


def _within(lengths, x):
    return np.arange(x.shape[2]) < np.asarray(lengths)[:, None]


@_compiled
def _attention(q, k, v, scale, *, query_mask, key_mask, is_causal):
    layer = keras.layers.Attention(use_scale=scale is not None, dtype=_dtype(q))
    weights = [] if scale is None else [keras.ops.cast(keras.ops.convert_to_tensor(scale, _dtype(q)), _dtype(q))]
    items, heads = q.shape[:2]
    folded = [keras.ops.reshape(x, (items * heads, *x.shape[2:])) for x in (q, v, k)]
    both = query_mask, key_mask
    masks = [m if m is None else keras.ops.repeat(keras.ops.convert_to_tensor(m), heads, 0) for m in both]
    mask = None if query_mask is None and key_mask is None else masks
    y = _call(layer, [[x.shape for x in folded]], weights, folded, mask=mask, use_causal_mask=is_causal)
    return keras.ops.reshape(y, (items, heads, *y.shape[1:]))


def additive_attention(query, memory, params, *, mask):
    """Its projections are linear, and the caller's."""
    if mask is not None and not np.asarray(mask).any(axis=1).all():
        raise NotHandled("a sentence with nothing to attend to, which the layer's documentation rules out")
    return _additive_attention(query, memory, params, mask=mask)


@_compiled
def _additive_attention(query, memory, params, *, mask):
    query, key = (_linear(x, p) for x, p in ((query, params.w), (memory, params.u)))
    layer, inputs = keras.layers.AdditiveAttention(dtype=_dtype(query)), [query, memory, key]
    mask = None if mask is None else [None, mask]
    return _call(layer, [[x.shape for x in inputs]], [params.v], inputs, mask=mask, return_attention_scores=True)


def _linear(x, params):
    y = keras.ops.matmul(x, keras.ops.transpose(params.weight))
    return y if params.bias is None else y + params.bias


def additive_example(draw):
    """Without a bias of the scores, and without a norm of v."""
    call = additive_reference.example(draw)
    return call._replace(args=(*call.args[:2], call.args[2]._replace(b=None, g=None)))


# --- layers and operations ------------------------------------------------------------------------------------


@_compiled
def dense(x, params):
    layer = keras.layers.Dense(params.weight.shape[0], use_bias=params.bias is not None, dtype=_dtype(x))
    _refuse_bias_sum(params.bias, int(np.prod(x.shape[:-1])))
    return _call(layer, [x.shape], [keras.ops.transpose(params.weight), *_present(params.bias)], x)


def _present(*arrays):
    return [x for x in arrays if x is not None]


@_compiled
def conv(x, params, *, stride, padding, dilation, groups):
    _refuse_bias_sum(params.bias, x.shape[0] * int(np.prod(x.shape[2:])))
    outputs, _, *kernel = params.weight.shape
    stride = (stride,) * len(kernel) if isinstance(stride, int) else stride
    if max(stride) > 1 and max(dilation) > 1:
        raise NotHandled("strides and dilation")
    options = {"strides": stride, "padding": _padding(kernel, stride, padding, dilation), "dilation_rate": dilation}
    options |= {"groups": groups, "use_bias": params.bias is not None, "dtype": _dtype(x)}
    layer = {3: keras.layers.Conv1D, 4: keras.layers.Conv2D, 5: keras.layers.Conv3D}[len(x.shape)]
    weight = keras.ops.transpose(params.weight, (*range(2, len(x.shape)), 1, 0))
    return _channels_last(layer(outputs, tuple(kernel), **options), x, weight, *_present(params.bias))


def _channels_last(layer, x, *weights):
    """What such a layer makes of (N, C, *S)."""
    x = keras.ops.moveaxis(x, 1, -1)
    return keras.ops.moveaxis(_call(layer, [x.shape], weights, x), -1, 1)


def _padding(kernel, stride, padding, dilation):
    """By Keras' name."""
    if not any(padding):
        return "valid"
    if max(stride) > 1 or any(2 * p != d * (k - 1) for p, k, d in zip(padding, kernel, dilation)):
        raise NotHandled("padding of another size than Keras'")
    return "same"


@_compiled
def max_pool(x, *, kernel, stride, padding, dilation):
    if max(dilation) > 1:
        raise NotHandled("dilation")
    _refuse_three_axes(x, {"tensorflow": ("float64", "float16")})
    layer = {3: keras.layers.MaxPooling1D, 4: keras.layers.MaxPooling2D, 5: keras.layers.MaxPooling3D}[len(x.shape)]
    return _pool(layer, x, kernel, stride, padding)


@_compiled
def average_pool(x, *, kernel, stride, padding, count_include_pad):
    if count_include_pad and any(padding):
        raise NotHandled("padding that counts")
    _refuse_three_axes(x, {"torch": ("bfloat16", "float16"), "tensorflow": ("float64", "float16")})
    layers = {3: keras.layers.AveragePooling1D, 4: keras.layers.AveragePooling2D, 5: keras.layers.AveragePooling3D}
    return _pool(layers[len(x.shape)], x, kernel, stride, padding)


def _refuse_three_axes(x, lacking):
    if len(x.shape) == 5 and _dtype(x) in lacking.get(BACKEND, ()):
        raise NotHandled(f"three axes of space in {_dtype(x)}, which {BACKEND} does not have on the CPU")


def _pool(layer, x, kernel, stride, padding):
    steps = kernel if stride is None else (stride,) * len(kernel) if isinstance(stride, int) else stride
    padding = _padding(kernel, steps, padding, (1,) * len(kernel))
    return _channels_last(layer(kernel, steps, padding=padding, dtype=_dtype(x)), x)


def conv_example(draw):
    call = conv_reference.example(draw)
    return _as_keras_pads(draw, call, call.args[1].weight.shape[2:])


def max_pool_example(draw):
    call = max_pool_reference.example(draw)
    options = call.options | {"dilation": (1,) * len(call.options["kernel"])}
    return _as_keras_pads(draw, call._replace(options=options), options["kernel"])


def average_pool_example(draw):
    call = average_pool_reference.example(draw)
    call = _as_keras_pads(draw, call, call.options["kernel"])
    return call._replace(options=call.options | {"count_include_pad": not any(call.options["padding"])})


def _as_keras_pads(draw, call, kernel):
    """No padding, or that of "same" where it is the same on both sides."""
    dilation = call.options.get("dilation", (1,) * len(kernel))
    options = call.options | {"padding": (0,) * len(kernel)}
    if draw.choice("same", True, False) and all(d * (k - 1) % 2 == 0 for k, d in zip(kernel, dilation)):
        options |= {"padding": tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation)), "stride": 1}
    elif max(dilation) > 1:
        options["stride"] = 1
    return call._replace(options=options)


@_compiled
def layer_norm(x, params=None, *, axes, eps):
    gamma, beta = params or (None, None)
    affine = {"center": beta is not None, "scale": gamma is not None}
    layer = keras.layers.LayerNormalization(list(range(-axes, 0)), eps, dtype=_dtype(x), **affine)
    return _call(layer, [x.shape], _present(gamma, beta), x)


@_compiled
def rms_norm(x, params=None, *, eps):
    if params is None:
        raise NotHandled("without gamma")
    return _call(keras.layers.RMSNormalization(-1, eps, dtype=_dtype(x)), [x.shape], params, x)


@_compiled
def group_norm(x, params=None, *, groups, eps):
    affine = {"center": params is not None, "scale": params is not None}
    layer = keras.layers.GroupNormalization(groups, 1, eps, dtype=_dtype(x), **affine)
    return _call(layer, [x.shape], params or (), x)


def batch_norm_train(x, params=None, *, eps=1e-5):
    if BACKEND == "torch":
        numbers = np.moveaxis(x.detach().double().numpy(), 1, 0).reshape(x.shape[1], -1)
        # The variance is off by about 2^-24 mean^2, which counts where it is more than the rounding of what is stored.
        often = {"float32": 1, "bfloat16": 2**16, "float16": 2**13}[_dtype(x)]
        if (numbers.mean(axis=1) ** 2 > often * numbers.var(axis=1)).any():
            raise Departure("keras-torch-batch-norm-variance", "a large mean: keras 3.15.1 subtracts squares")
    return _batch_norm(x, params, None, eps=eps)


def batch_norm_eval(x, params=None, *, stats=None, eps=1e-5):
    if stats is None:
        raise NotHandled("training")
    return _batch_norm(x, params, stats, eps=eps)


@_compiled
def _batch_norm(x, params, stats, *, eps):
    affine = {"center": params is not None, "scale": params is not None}
    layer = keras.layers.BatchNormalization(1, epsilon=eps, dtype=_dtype(x), **affine)
    state = stats or [keras.ops.zeros(x.shape[1], _dtype(x))] * 2
    return _call(layer, [x.shape], params or (), x, state=state, training=stats is None)


@_compiled
def embedding(table, *, ids, padding_idx):
    if padding_idx is not None:
        raise NotHandled("padding_idx")
    return _call(keras.layers.Embedding(*table.shape, dtype=_dtype(table)), [ids.shape], [table], ids)


@_compiled
def softmax(s, *, mask=None, axis):
    return _call(keras.layers.Softmax(axis, dtype=_dtype(s)), [s.shape], [], s, mask=mask)


@_compiled
def log_softmax(s, *, axis):
    return keras.ops.log_softmax(s, axis)


@_compiled
def logsumexp(s, *, axis, keepdims):
    return keras.ops.logsumexp(s, axis, keepdims)


# --- recurrent layers -----------------------------------------------------------------------------------------


@_compiled
def rnn_cell(x, h, params):
    return _call(_kind(keras.layers.SimpleRNNCell, params, x), [x.shape], _cell_weights(params), x, [h])[0]


@_compiled
def gru_cell(x, h, params, *, reset_after, z_weighs):
    layer = _kind(keras.layers.GRUCell, params, x, reset_after=reset_after)
    return _call(layer, [x.shape], _cell_weights(params, reset_after, z_weighs), x, [h])[0]


@_compiled
def lstm_cell(x, state, params):
    layer = _kind(keras.layers.LSTMCell, params, x)
    return tuple(_call(layer, [x.shape], _cell_weights(params), x, list(state))[1])


def _kind(layer, params, x, **options):
    _refuse_bias_sum(next(iter(_present(*params[2:])), None), x.shape[0])
    return layer(params.w_h.shape[-1], use_bias=bool(_present(*params[2:])), dtype=_dtype(x), **options)


def _cell_weights(params, reset_after=False, z_weighs="old"):
    """Gates side by side, in Keras' order; one bias, the sum of both, but for a GRU that resets after the product."""
    if params.w_x is None:
        raise NotHandled("inputs that are projected already")
    if z_weighs != "old":
        raise NotHandled("an update gate that weighs the new state")
    gru = isinstance(params, gru_cell_reference.Params)

    def beside(x, last):
        if x is not None and gru:
            x = keras.ops.take(x, [1, 0, 2], axis=0)
        return None if x is None else keras.ops.reshape(x, (-1, last) if last else (-1,))

    weights = [keras.ops.transpose(beside(w, w.shape[-1])) for w in params[:2]]
    biases = [beside(b, 0) for b in params[2:]]
    if not _present(*biases):
        return weights
    if gru and reset_after:
        nothing = keras.ops.zeros_like(_present(*biases)[0])
        return [*weights, keras.ops.stack([nothing if b is None else b for b in biases])]
    return [*weights, sum(_present(*biases))]


def recurrent(x, state, params, *, direction, mask, padded, reset_after=True, z_weighs="old"):
    if mask is not None and state is not None and padded == "hold":
        ends = {"forward": (0,), "backward": (-1,), "both": (0, -1)}[direction]
        if not np.asarray(mask)[:, ends].all():
            raise NotHandled("padding first, and held: Keras holds the output before it, of which there is none")
    options = {"direction": direction, "padded": padded, "reset_after": reset_after, "z_weighs": z_weighs}
    return _recurrent(x, state, params, mask=mask, **options)


@_compiled
def _recurrent(x, state, params, *, direction, mask, padded, reset_after, z_weighs):
    ways = {"forward": (False,), "backward": (True,), "both": (False, True)}[direction]
    finals = []
    for layer in range(0, len(params.cells), len(ways)):
        outputs = []
        for i, backward in enumerate(ways, layer):
            start = None if state is None else [part[:, i] for part in _present(*state)]
            options = {"mask": mask, "zero_output_for_mask": padded == "zero", "go_backwards": backward}
            y, *final = _scan(x, start, params.cells[i], reset_after=reset_after, z_weighs=z_weighs, **options)
            outputs.append(keras.ops.flip(y, axis=1) if backward else y)
            finals.append(final)
        x = keras.ops.concatenate(outputs, axis=-1)
    return x, tuple(keras.ops.stack(parts, axis=1) for parts in zip(*finals))


def _scan(x, start, cell, *, reset_after, z_weighs, mask, **options):
    kinds = {gru_cell_reference.Params: keras.layers.GRU, lstm_cell_reference: keras.layers.LSTM}
    kind = kinds.get(type(cell), keras.layers.SimpleRNN)
    if kind is keras.layers.GRU:
        options["reset_after"] = reset_after
    layer = _kind(kind, cell, x, return_sequences=True, return_state=True, **options)
    weights = _cell_weights(cell, reset_after, z_weighs)
    return _call(layer, [x.shape], weights, x, initial_state=start, mask=mask)


class FewShapes:
    """A draw whose sizes and choices are those of one of six calls, some of them stretched; its numbers are its own."""

    def __init__(self, draw):
        which = int(draw.rng.integers(6))
        shapes = Stretched([which], which) if which % 3 else RandomDraw(which)
        self.size, self.choice = shapes.size, shapes.choice
        self.rng, self.array, self.mask, self.like = draw.rng, draw.array, draw.mask, draw.like


def _of_few_shapes(example):
    """On JAX, where a program of attention is compiled for every shape, which takes a second."""
    return (lambda draw: example(FewShapes(draw))) if BACKEND == "jax" else example


# On JAX every shape is compiled, which takes a second: there are two dtypes of it. And the fused product of float16 is
# not there on the CPU ("F16_F16_F32 is not supported by dot_general").
EVERY_DTYPE = ("float32", "bfloat16") if BACKEND == "jax" else ("float64", "float32", "bfloat16", "float16")
# On torch Keras' rules of promotion make float32 of float64 in much of what it computes, whatever the layer's dtype
# says: docs/findings/keras-float64.md.
SINGLE = EVERY_DTYPE[1:] if BACKEND == "torch" else EVERY_DTYPE
# Sums that are rounded to 16 bits after every term: sums of 600 random terms are off by up to 130 units in the last
# place, while the others are rounded once. On every backend the gradients of Embedding and MaxPooling are such sums; on
# torch that of AveragePooling, on JAX its output, too, and on TensorFlow both, but in float16 only.
SUMS = {
    eager.out.name: eager._replace(name=f"{eager.name}, sums too", accumulator=eager.out)
    for eager in (ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"])
}
AVERAGES = {"float16": SUMS["float16"]} if BACKEND == "tensorflow" else SUMS
LAYERS = (
    (
        "layers.MultiHeadAttention, scores",
        "multi_head",
        multi_head_attention_scores,
        _of_few_shapes(multi_head_example),
        EVERY_DTYPE,
    ),
    (
        "layers.GroupQueryAttention",
        "grouped_query_layer",
        grouped_query_attention,
        _of_few_shapes(grouped_query_example),
        EVERY_DTYPE,
    ),
    ("layers.AdditiveAttention", "additive", additive_attention, _of_few_shapes(additive_example), SINGLE),
    ("layers.SimpleRNN, GRU, LSTM", "recurrent", recurrent, _of_few_shapes(recurrent_reference.example), SINGLE),
    ("layers.SimpleRNNCell", "rnn_cell", rnn_cell, None, SINGLE),
    ("layers.GRUCell", "gru_cell", gru_cell, _of_few_shapes(gru_cell_reference.example), SINGLE),
    ("layers.LSTMCell", "lstm_cell", lstm_cell, None, SINGLE),
    ("layers.Dense", "linear", dense, None, SINGLE),
    ("layers.Conv1D, Conv2D, Conv3D", "conv", conv, conv_example, EVERY_DTYPE),
    ("layers.BatchNormalization, training", "batch_norm", batch_norm_train, None, SINGLE),
    ("layers.BatchNormalization, inference", "batch_norm", batch_norm_eval, None, SINGLE),
    ("layers.LayerNormalization", "layer_norm", layer_norm, None, SINGLE),
    ("layers.GroupNormalization", "group_norm", group_norm, None, SINGLE),
    ("layers.RMSNormalization", "rms_norm", rms_norm, None, SINGLE),
    ("layers.MaxPooling1D, 2D, 3D", "max_pool", max_pool, max_pool_example, EVERY_DTYPE, SUMS),
    ("layers.AveragePooling1D, 2D, 3D", "average_pool", average_pool, average_pool_example, EVERY_DTYPE, AVERAGES),
    ("layers.Embedding", "embedding", embedding, None, EVERY_DTYPE, SUMS),
    ("layers.Softmax", "softmax", softmax, None, EVERY_DTYPE),
    ("ops.log_softmax", "log_softmax", log_softmax, None, EVERY_DTYPE),
    ("ops.logsumexp", "logsumexp", logsumexp, None, EVERY_DTYPE),
)


def targets(arithmetic, times=3, promises=MappingProxyType({})):
    """The rows; `arithmetic` and `times` are those of the backend's attention.

    `promises` is what else the backend's own code promises: {name of a row: {dtype: Arithmetic}}.
    """
    attentions = {"like": "dot_product_attention", "times": times}
    rows = (
        Target(
            "ops.dot_product_attention",
            function=dot_product_attention,
            dtypes=SINGLE,
            arithmetic=arithmetic,
            convention={"torch": "keras_ops_torch", "jax": "jax"}.get(BACKEND, "keras_ops"),
            **attentions,
        ),
        Target("layers.Attention", function=attention, dtypes=SINGLE, convention="keras_attention", **attentions),
        Target(
            "layers.MultiHeadAttention",
            "multi_head",
            multi_head_attention,
            _of_few_shapes(multi_head_example),
            dtypes=SINGLE,
        ),
        *(Target(*row) for row in LAYERS),
    )
    return tuple(row._replace(arithmetic=dict(row.arithmetic) | promises.get(row.name, {})) for row in rows)
