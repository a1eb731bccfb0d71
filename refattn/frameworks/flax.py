"""Flax, linen and nnx: JAX's arrays in and out, gradients by jax.vjp.

A target is a function called like the reference's forward, but with JAX's arrays. Every shape is compiled.
"""

import functools

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

from refattn.attention.dot_product import multi_head
from refattn.core import Call
from refattn.frameworks import Target
from refattn.frameworks.jax import ATTENTION as jax_attention
from refattn.frameworks.jax import SUMS_AS_GIVEN, run
from refattn.oracle.arithmetic import ARITHMETICS, BFLOAT16, FLOAT16, OF_DTYPE
from refattn.oracle.contract import Departure, NotHandled
from refattn.oracle.conventions import PRESETS

__all__ = ["TARGETS", "VERSION", "run"]
VERSION = flax.__version__


def linen_attention(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False):
    if q.shape[1] != k.shape[1]:
        raise NotHandled("heads that share keys")
    return _linen_attention(q, k, v, attn_bias, attn_mask, is_causal, False)


def linen_attention_wide(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False):
    """The softmax is in float32, whatever is given, and all that follows."""
    if q.shape[1] != k.shape[1]:
        raise NotHandled("heads that share keys")
    return _linen_attention(q, k, v, attn_bias, attn_mask, is_causal, True)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _linen_attention(q, k, v, bias, mask, is_causal, wide):
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # the masks that are combined have one rank
    causal = _causal(q, k) if is_causal else None
    given = (_by_time(x) for x in (q, k, v))
    y = linen.dot_product_attention(*given, bias, linen.combine_masks(mask, causal), force_fp32_for_softmax=wide)
    return _by_time(y.astype(q.dtype))  # where `wide`, it comes in float32


def nnx_attention(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False):
    if k.shape != v.shape:
        raise NotHandled("values that are not shaped as the keys are")
    return _nnx_attention(q, k, v, attn_bias, attn_mask, is_causal, False)


def nnx_attention_kept(q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False):
    """Another path of nnx, its own: where a module keeps the weights."""
    if is_causal and attn_mask is not None and attn_mask.shape[-2:] != (q.shape[2], k.shape[2]):
        words = "causal, and a mask that is the same for all queries: flax 0.12.8 raises ValueError"
        raise Departure("flax-nnx-causal-and-a-mask", words)
    return _nnx_attention(q, k, v, attn_bias, attn_mask, is_causal, True)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _nnx_attention(q, k, v, bias, mask, is_causal, kept):
    given = (_by_time(x) for x in (q, k, v))
    module = nnx.Module() if kept else None
    return _by_time(nnx.dot_product_attention(*given, bias, mask, module=module, is_causal=is_causal))


# heads, features, those of keys and values, B, Q, K, bias, masked, padded, causal
LAYERS = (
    (1, 3, 3, 2, 4, 5, True, False, True, False),
    (2, 4, 4, 1, 5, 3, False, True, False, True),
    (3, 6, 2, 2, 3, 4, True, True, True, False),
    (2, 2, 5, 3, 4, 4, True, False, False, True),
)


def attention_layer(draw):
    """One of four layers, as every one takes seconds to compile; there is a key for every query."""
    heads, e, f, b, queries, keys, bias, masked, padded, is_causal = draw.choice("layer", *LAYERS)
    mask = draw.mask(b, heads, queries, keys) if masked else None
    key_mask = draw.mask(b, keys) if padded else None
    for some in (mask, key_mask):
        if some is not None:
            some[..., 0] = True
    params = draw.like(multi_head.init(draw.rng, e, key_features=f, value_features=f, bias=bias))
    arrays = (draw.array(*shape) for shape in ((b, queries, e), (b, keys, f), (b, keys, f)))
    return Call((*arrays, params), {"heads": heads, "mask": mask, "key_mask": key_mask, "is_causal": is_causal})


def linen_attention_layer(q, k, v, params, *, heads, mask=None, key_mask=None, is_causal=False):
    return _linen_attention_layer(q, k, v, params, heads, mask, key_mask, is_causal)


@functools.partial(jax.jit, static_argnums=(4, 7))
def _linen_attention_layer(q, k, v, params, heads, mask, key_mask, is_causal):
    layer = linen.MultiHeadDotProductAttention(
        heads,
        qkv_features=len(params.q.weight),
        out_features=len(params.out.weight),
        use_bias=params.q.bias is not None,
    )
    kernels = {name: _named(pair) for name, pair in _kernels(params, heads).items()}
    masks = mask, None if key_mask is None else key_mask[:, None, None], _causal(q[:, None], k[:, None])
    return layer.apply({"params": kernels}, q, k, v, mask=linen.combine_masks(*masks[: 2 + is_causal]))


def nnx_attention_layer(q, k, v, params, *, heads, mask=None, key_mask=None, is_causal=False):
    if k.shape[-1] != v.shape[-1]:
        raise NotHandled("values with other features than the keys")
    return _nnx_attention_layer(q, k, v, params, heads, mask, key_mask, is_causal)


@functools.partial(jax.jit, static_argnums=(4, 7))
def _nnx_attention_layer(q, k, v, params, heads, mask, key_mask, is_causal):
    layer = nnx.MultiHeadAttention(
        heads,
        q.shape[-1],
        len(params.q.weight),
        len(params.out.weight),
        in_kv_features=k.shape[-1],
        use_bias=params.q.bias is not None,
        param_dtype=q.dtype,
        decode=False,
        rngs=nnx.Rngs(0),
    )
    for name, (kernel, bias) in _kernels(params, heads).items():
        part = getattr(layer, name)
        part.kernel[...] = kernel
        if bias is not None:
            part.bias[...] = bias
    key_mask = None if key_mask is None else key_mask[:, None, None]
    return layer(q, k, v, mask=nnx.combine_masks(mask, key_mask), is_causal=is_causal)


def _kernels(params, heads):
    """(kernel, bias) of every projection: (E, H, D) and (H, D), of the last (H, D, E) and (E,)."""

    def heads_last(projection):
        weight, bias = projection
        return weight.T.reshape(weight.shape[1], heads, -1), None if bias is None else bias.reshape(heads, -1)

    weight, bias = params.out
    pairs = {"query": heads_last(params.q), "key": heads_last(params.k), "value": heads_last(params.v)}
    return pairs | {"out": (weight.T.reshape(heads, -1, len(weight)), bias)}


def _named(arrays, *names):
    return {name: x for name, x in zip(names or ("kernel", "bias"), arrays) if x is not None}


def _by_time(x):
    """(B, H, T, D) as (B, T, H, D), and back."""
    return x.swapaxes(1, 2)


def _causal(q, k):
    """As linen.make_causal_mask makes it, for queries that are not as many as the keys."""
    return linen.make_attention_mask(jnp.arange(q.shape[2])[None], jnp.arange(k.shape[2])[None], jnp.greater_equal)


@jax.jit
def linear(x, params):
    layer = linen.Dense(len(params.weight), use_bias=params.bias is not None)
    return layer.apply({"params": _named((params.weight.T, params.bias))}, x)


def conv(x, params, *, stride, padding, dilation, groups):
    settled = (n if isinstance(n, int) else tuple(n) for n in (stride, padding, dilation))
    return _conv(x, params, *settled, groups)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _conv(x, params, stride, padding, dilation, groups):
    weight, bias = params
    layer = linen.Conv(
        len(weight),
        weight.shape[2:],
        stride,
        [(p, p) for p in padding],
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias is not None,
    )
    kernel = jnp.moveaxis(weight, (0, 1), (-1, -2))
    return _channels_first(layer.apply({"params": _named((kernel, bias))}, _channels_last(x)))


def layer_norm(x, params=None, *, axes, eps):
    return _layer_norm(x, params, axes, eps)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _layer_norm(x, params, axes, eps):
    gamma, beta = params or (None, None)
    over = tuple(range(-axes, 0))
    affine = {"use_scale": gamma is not None, "use_bias": beta is not None}
    layer = linen.LayerNorm(eps, **affine, reduction_axes=over, feature_axes=over, use_fast_variance=False)
    return layer.apply({"params": _named((gamma, beta), "scale", "bias")}, x)


def group_norm(x, params=None, *, groups, eps):
    return _group_norm(x, params, groups, eps)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _group_norm(x, params, groups, eps):
    affine = {"use_scale": params is not None, "use_bias": params is not None}
    layer = linen.GroupNorm(groups, epsilon=eps, **affine, use_fast_variance=False)
    weights = {"params": _named(params or (), "scale", "bias")}
    return _channels_first(layer.apply(weights, _channels_last(x)))


def rms_norm(x, params=None, *, eps):
    return _rms_norm(x, params, eps)


@functools.partial(jax.jit, static_argnums=2)
def _rms_norm(x, params, eps):
    layer = linen.RMSNorm(eps, use_scale=params is not None)
    return layer.apply({"params": _named(params or (), "scale")}, x)


@jax.jit
def rnn_cell(x, h, params):
    layer = linen.SimpleCell(h.shape[-1])
    bias = _sum(params.b_x, params.b_h, h)
    weights = {"i": _named((params.w_x.T, bias)), "h": _named((params.w_h.T,))}
    return layer.apply({"params": weights}, h, x)[0]


def gru_cell(x, h, params, *, reset_after, z_weighs):
    if params.w_x is None or not reset_after or z_weighs == "new":
        raise NotHandled("what is projected already, reset before the product, or weighed by 1 - z")
    return _gru_cell(x, h, params)


@jax.jit
def _gru_cell(x, h, params):
    zeros = jnp.zeros((3, h.shape[-1]), h.dtype)
    b_x, b_h = (zeros if b is None else b for b in params[2:])
    weights = {}
    for i, gate in enumerate("rzn"):  # of r and z there is one bias
        weights[f"i{gate}"] = _named((params.w_x[i].T, b_x[i] if gate == "n" else b_x[i] + b_h[i]))
        weights[f"h{gate}"] = _named((params.w_h[i].T, b_h[i] if gate == "n" else None))
    return linen.GRUCell(h.shape[-1]).apply({"params": weights}, h, x)[0]


@jax.jit
def lstm_cell(x, state, params):
    weights = {}
    for i, gate in enumerate("ifgo"):
        biases = (None if b is None else b[i] for b in params[2:])
        weights[f"i{gate}"] = _named((params.w_x[i].T,))
        weights[f"h{gate}"] = _named((params.w_h[i].T, _sum(*biases, state.h[0])))
    (c, h), _ = linen.OptimizedLSTMCell(state.h.shape[-1]).apply({"params": weights}, (state.c, state.h), x)
    return h, c


def _sum(b_x, b_h, like):
    zeros = jnp.zeros(like.shape[-1], like.dtype)
    return (zeros if b_x is None else b_x) + (zeros if b_h is None else b_h)


def max_pool(x, *, kernel, stride, padding):
    return _max_pool(x, *_windows(kernel, stride, padding))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _max_pool(x, kernel, stride, padding):
    return _channels_first(linen.max_pool(_channels_last(x), kernel, stride, padding))


def average_pool(x, *, kernel, stride, padding, count_include_pad):
    return _average_pool(x, *_windows(kernel, stride, padding), count_include_pad)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _average_pool(x, kernel, stride, padding, padded):
    return _channels_first(linen.avg_pool(_channels_last(x), kernel, stride, padding, padded))


def _windows(kernel, stride, padding):
    stride = kernel if stride is None else (stride,) * len(kernel) if isinstance(stride, int) else stride
    return tuple(kernel), tuple(stride), tuple((p, p) for p in padding)


def _channels_last(x):
    return jnp.moveaxis(x, 1, -1)


def _channels_first(x):
    return jnp.moveaxis(x, -1, 1)


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"
LOW = {"bfloat16": BFLOAT16, "float16": FLOAT16}
# jax.nn.softmax stores each of its steps, s - max, exp, the sum and the quotient, as what it was given (its jaxpr).
SOFTMAX_AS_GIVEN = {
    name: ARITHMETICS[OF_DTYPE[name]]._replace(name=f"{name}, softmax too", softmax=form, exp_error=1.01 * form.u)
    for name, form in LOW.items()
}
TARGETS = (
    Target(
        "linen.dot_product_attention",
        "dot_product_attention",
        linen_attention,
        dtypes=EVERY_DTYPE,
        arithmetic=SOFTMAX_AS_GIVEN,
        convention="flax",
    ),
    Target(
        "linen.dot_product_attention, force_fp32_for_softmax",
        "dot_product_attention",
        linen_attention_wide,
        dtypes=tuple(LOW),
        convention=PRESETS["flax"]._replace(softmax_precision="float32"),
    ),
    Target(
        "nnx.dot_product_attention",
        "dot_product_attention",
        nnx_attention,
        dtypes=tuple(jax_attention),
        arithmetic=jax_attention,
        convention="jax",
    ),
    Target(
        "nnx.dot_product_attention, weights kept",
        "dot_product_attention",
        nnx_attention_kept,
        dtypes=EVERY_DTYPE,
        arithmetic=SOFTMAX_AS_GIVEN,
        convention="flax",
    ),
    Target(
        "linen.MultiHeadDotProductAttention",
        "multi_head",
        linen_attention_layer,
        attention_layer,
        dtypes=EVERY_DTYPE,
        arithmetic=SUMS_AS_GIVEN,
    ),
    Target(
        "nnx.MultiHeadAttention",
        "multi_head",
        nnx_attention_layer,
        attention_layer,
        dtypes=tuple(jax_attention),
        arithmetic=SUMS_AS_GIVEN | {"float64": jax_attention["float64"]},
    ),
    Target("linen.SimpleCell", "rnn_cell", rnn_cell),
    Target("linen.GRUCell", "gru_cell", gru_cell),
    Target("linen.OptimizedLSTMCell", "lstm_cell", lstm_cell),
    Target("linen.Dense", "linear", linear),
    Target("linen.Conv", "conv", conv),
    Target("linen.LayerNorm", "layer_norm", layer_norm),
    Target("linen.GroupNorm", "group_norm", group_norm),
    Target("linen.RMSNorm", "rms_norm", rms_norm),
    Target("linen.max_pool", "max_pool", max_pool),
    Target("linen.avg_pool", "average_pool", average_pool),
)
