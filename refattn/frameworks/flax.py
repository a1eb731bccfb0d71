"""Flax, linen and nnx: JAX's arrays in and out, gradients by jax.vjp.

A target is a function called like the reference's forward, but with JAX's arrays. Every shape is compiled.
"""

import functools

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

from refattn.frameworks import Target
from refattn.frameworks._examples import attention_layer
from refattn.frameworks.jax import ATTENTION as jax_attention
from refattn.frameworks.jax import run
from refattn.oracle.arithmetic import ARITHMETICS, BFLOAT16, FLOAT16, OF_DTYPE
from refattn.oracle.contract import Departure, NotHandled

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


def _named(pair):
    return {name: x for name, x in zip(("kernel", "bias"), pair) if x is not None}


def _by_time(x):
    """(B, H, T, D) as (B, T, H, D), and back."""
    return x.swapaxes(1, 2)


def _causal(q, k):
    """As linen.make_causal_mask makes it, for queries that are not as many as the keys."""
    return linen.make_attention_mask(jnp.arange(q.shape[2])[None], jnp.arange(k.shape[2])[None], jnp.greater_equal)


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"
LOW = {"bfloat16": BFLOAT16, "float16": FLOAT16}
# jax.nn.softmax stores each of its steps, s - max, exp, the sum and the quotient, as what it was given (its jaxpr).
SOFTMAX_AS_GIVEN = {
    name: ARITHMETICS[OF_DTYPE[name]]._replace(name=f"{name}, softmax too", softmax=form, exp_error=1.01 * form.u)
    for name, form in LOW.items()
}
# The gradient of what was broadcast (a bias) is a sum that XLA's CPU code stores as bfloat16 or float16 after every
# addition, in parts of 32 (the HLO of lax.reduce_sum; jnp.sum widens, autodiff does not).
SUMS_AS_GIVEN = {
    name: ARITHMETICS[OF_DTYPE[name]]._replace(name=f"{name}, sums too", accumulator=form) for name, form in LOW.items()
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
        convention="flax",
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
)
