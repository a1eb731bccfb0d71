"""JAX: its arrays in and out, gradients by jax.vjp, and what of it is cross-checked.

A target is a function called like the reference's forward, but with JAX's arrays. Adding one is adding a row to
TARGETS. Where an argument is of float64, jax_enable_x64 is on for as long as the call takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from refattn.core import leaves, tree_map
from refattn.frameworks import Target
from refattn.oracle.arithmetic import ARITHMETICS, BFLOAT16, FLOAT16, FLOAT32, OF_DTYPE
from refattn.oracle.contract import NotHandled

VERSION = jax.__version__


def run(candidate, args, options, dout):
    """Call it with JAX's arrays: (result, gradients) in NumPy; no gradients where dout is None."""
    before = jax.config.jax_enable_x64
    if any(x.dtype == np.float64 for _, x in leaves(tuple(args))):
        jax.config.update("jax_enable_x64", True)
    try:
        return _run(candidate, args, options, dout)
    finally:
        jax.config.update("jax_enable_x64", before)


def _run(candidate, args, options, dout):
    args = tree_map(jnp.asarray, tuple(args))
    options = {name: tree_map(_of_jax, value) for name, value in options.items()}
    if dout is None:
        return _plain(candidate(*args, **options)), None
    result, douts = None, None

    def differentiable(*args):
        nonlocal douts
        found = candidate(*args, **options)
        found = tuple(found) if isinstance(found, list) else found
        pairs = [(y, jnp.asarray(d)) for (_, y), (_, d) in zip(leaves(found), leaves(dout)) if _differentiable(y, d)]
        douts = [d for _, d in pairs]
        return [y for y, _ in pairs], found

    _, pullback, result = jax.vjp(differentiable, *args, has_aux=True)
    grads = pullback(douts) if douts else tree_map(lambda x: None, args)
    return _plain(result), tree_map(_array, grads)


def _of_jax(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _differentiable(y, d):
    return isinstance(y, jax.Array) and y.shape == d.shape and y.dtype == d.dtype


def _plain(result):
    result = tuple(result) if isinstance(result, list) else result
    return tree_map(lambda y: _array(y) if isinstance(y, jax.Array) else y, result)


def _array(x):
    return np.asarray(x)


# --- the targets ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="axis")
def softmax(s, *, mask=None, axis):
    if mask is not None:
        mask = jnp.broadcast_to(mask, s.shape)
    return jax.nn.softmax(s, axis, where=mask)


def log_softmax(s, *, axis):
    return jax.nn.log_softmax(s, axis)


@functools.partial(jax.jit, static_argnames=("axis", "keepdims"))
def logsumexp(s, *, mask=None, axis, keepdims):
    if mask is not None:
        mask = jnp.broadcast_to(mask, s.shape)
    return jax.nn.logsumexp(s, axis, keepdims=keepdims, where=mask)


def dot_product_attention(
    q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, scale=None, window=None, q_seqlens=None,
    kv_seqlens=None, return_lse=False,
):  # fmt: skip
    """jax.nn's, by XLA."""
    if k.shape != v.shape:
        raise NotHandled("values that are not shaped as the keys are")
    if return_lse and q_seqlens is not None:
        raise NotHandled("lse of queries that are padding: it is that of logits that are masked")
    longest = max(q.shape[2], k.shape[2])
    lengths = {"query_seq_lengths": q_seqlens, "key_value_seq_lengths": kv_seqlens}
    result = _attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        attn_bias,
        attn_mask,
        scale=None if scale is None else float(scale),
        is_causal=is_causal,
        local_window_size=None if window is None else tuple(longest if n is None else int(n) for n in window),
        return_residual=return_lse,
        **{name: None if x is None else x.astype(jnp.int32) for name, x in lengths.items()},
    )
    return tuple(x.swapaxes(1, 2) for x in result) if return_lse else result.swapaxes(1, 2)


STATIC = "scale", "is_causal", "local_window_size", "return_residual"
_attention = functools.partial(jax.jit, static_argnames=STATIC)(
    functools.partial(jax.nn.dot_product_attention, implementation="xla")
)

# The softmax is of float32, also of float64; its result and the gradients that meet it are cast.
FLOAT64_ATTENTION = ARITHMETICS["float64"]._replace(
    name="float64, softmax in float32",
    **{"lse": FLOAT32, "scores": FLOAT32, "score_roundings": 1, "softmax": FLOAT32, "exp_error": 4 * FLOAT32.u},
    **{"probs": FLOAT32, "probs_normalised": True, "probs_in_dscores": True, "dprobs": FLOAT32, "dscores": FLOAT32},
)
# In bfloat16 logits and their softmax stay in float32; what is returned as lse is cast, too. XLA has no product of
# float16 that is accumulated in float32 on the CPU, and refuses.
ATTENTION = {
    "float64": FLOAT64_ATTENTION,
    "float32": "jax_cpu_float32",
    "bfloat16": ARITHMETICS["jax_cpu_bfloat16"]._replace(name="jax_cpu_bfloat16, lse too", lse=BFLOAT16),
}
EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"

# The gradient of what was broadcast (a bias, a row's logarithm) is a sum that XLA's CPU code stores as bfloat16 or
# float16 after every addition, in parts of 32: 256 and 15 ones are 256 in bfloat16, 2048 and 15 ones are 2048 in
# float16 (tests/test_jax_flax.py; jnp.sum widens, autodiff does not).
SUMS_AS_GIVEN = {
    name: ARITHMETICS[OF_DTYPE[name]]._replace(name=f"{name}, sums too", accumulator=form)
    for name, form in (("bfloat16", BFLOAT16), ("float16", FLOAT16))
}

TARGETS = (
    Target("softmax", "softmax", softmax, dtypes=EVERY_DTYPE),
    Target("log_softmax", "log_softmax", log_softmax, dtypes=EVERY_DTYPE, arithmetic=SUMS_AS_GIVEN),
    Target("logsumexp", "logsumexp", logsumexp, dtypes=EVERY_DTYPE),
    Target(
        "nn.dot_product_attention",
        "dot_product_attention",
        dot_product_attention,
        dtypes=tuple(ATTENTION),
        arithmetic=ATTENTION,
        convention="jax",
        times=2,  # every shape is compiled
    ),
)
