"""TensorFlow: tensors in and out, gradients by a GradientTape, and what of it is cross-checked.

A target is a function called like the reference's forward, but with tensors. Adding one is adding a row to TARGETS.
"""

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what it says of the machine when it is imported

import numpy as np
import tensorflow as tf

from refattn.core import leaves, tree_map
from refattn.frameworks import Target
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.oracle.contract import Departure, NotHandled

VERSION = tf.__version__


def run(candidate, args, options, dout):
    """Call it with tensors: (result, gradients) in NumPy; no gradients where dout is None."""
    args = tree_map(tf.constant, tuple(args))
    options = {name: tree_map(_tensor, value) for name, value in options.items()}
    with tf.GradientTape() as tape:
        tape.watch([x for _, x in leaves(args)])
        result = candidate(*args, **options)
    result = tuple(result) if isinstance(result, list) else result
    plain = tree_map(lambda y: y.numpy() if tf.is_tensor(y) else y, result)
    if dout is None:
        return plain, None
    pairs = [(y, tf.constant(d)) for (_, y), (_, d) in zip(leaves(result), leaves(dout)) if _differentiable(y, d)]
    inputs = [x for _, x in leaves(args)]
    grads = [None] * len(inputs)
    if pairs and inputs:
        outputs, douts = zip(*pairs)
        grads = tape.gradient(list(outputs), inputs, list(douts))
    grads = iter(grads)
    return plain, tree_map(lambda x: _array(next(grads)), args)


def _tensor(x):
    return tf.constant(x) if isinstance(x, np.ndarray) else x


def _differentiable(y, d):
    return tf.is_tensor(y) and y.shape == d.shape and y.dtype == tf.as_dtype(d.dtype)


def _array(x):
    return None if x is None else tf.convert_to_tensor(x).numpy()  # a sparse gradient becomes a dense one


# --- the targets ----------------------------------------------------------------------------------------------


def softmax(s, *, axis):
    return tf.nn.softmax(s, axis)


def log_softmax(s, *, axis):
    return tf.nn.log_softmax(s, axis)


def logsumexp(s, *, axis, keepdims):
    return tf.reduce_logsumexp(s, axis, keepdims)


def linear(x, params):
    return _biased(tf.tensordot(x, params.weight, [[-1], [1]]), params.bias)


def linear_by_matmul(x, params):
    if len(x.shape) > 2 and np.prod(x.shape[:-2]) > 1 and x.dtype in (tf.bfloat16, tf.float16):
        raise Departure(
            "tensorflow-matmul-weight-gradient",
            "one matrix for several items: tensorflow 2.21 stores its gradient for each",
        )
    return _biased(tf.matmul(x, params.weight, transpose_b=True), params.bias)


def _biased(y, bias):
    if bias is None:
        return y
    if y.dtype == tf.bfloat16 and tf.size(y) > 2 * tf.size(bias):  # a sum of two is rounded once, as it should be
        raise Departure("tensorflow-16-bit-sums", "tensorflow 2.21 sums the gradient of a bias in bfloat16")
    return tf.nn.bias_add(y, bias)


def conv(x, params, *, stride, padding, dilation, groups):
    if groups > 1 and not _differentiates_groups(len(x.shape), x.dtype):
        raise NotHandled("groups, whose gradient tensorflow does not have here")
    if stride != 1 and max(dilation) > 1:
        raise NotHandled("strides and dilation")
    weight = tf.transpose(params.weight, (*range(2, len(x.shape)), 1, 0))
    y = tf.nn.convolution(_padded(x, padding, 0), weight, stride, "VALID", _layout(x), list(dilation))
    return _channels_first(_biased(y, params.bias))


@functools.cache
def _differentiates_groups(rank, dtype):
    """Without oneDNN it does not; with it, not in three dimensions, nor in float64."""
    x, weight = tf.zeros((1, *(1,) * (rank - 2), 2), dtype), tf.zeros((*(1,) * (rank - 2), 1, 2), dtype)
    try:
        with tf.GradientTape() as tape:
            tape.watch([x, weight])
            y = tf.nn.convolution(x, weight)
        tape.gradient(y, [x, weight])
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return False
    return True


def max_pool(x, *, kernel, stride, padding, dilation):
    if max(dilation) > 1:
        raise NotHandled("dilation")
    _refuse_three_axes(x)
    y = tf.nn.max_pool(_padded(x, padding, -np.inf), kernel, _steps(kernel, stride), "VALID", _layout(x))
    return _channels_first(y)


def average_pool(x, *, kernel, stride, padding, count_include_pad):
    if any(padding) and not count_include_pad:
        raise NotHandled("padding that does not count")
    _refuse_three_axes(x)
    y = tf.nn.avg_pool(_padded(x, padding, 0), kernel, _steps(kernel, stride), "VALID", _layout(x))
    return _channels_first(y)


def _padded(x, padding, by):
    """(N, C, *S) as (N, *S, C), and padding on both sides of S."""
    x = tf.transpose(x, (0, *range(2, len(x.shape)), 1))
    return tf.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)], constant_values=tf.constant(by, x.dtype))


def _channels_first(x):
    return tf.transpose(x, (0, len(x.shape) - 1, *range(1, len(x.shape) - 1)))


def _layout(x):
    """Without it convolutions and pools of 2.21 have no gradient in three dimensions."""
    return {3: "NWC", 4: "NHWC", 5: "NDHWC"}[len(x.shape)]


def _steps(kernel, stride):
    return kernel if stride is None else stride


def _refuse_three_axes(x):
    if len(x.shape) == 5 and x.dtype in (tf.float64, tf.float16):
        raise NotHandled(f"three axes of space in {x.dtype.name}, which tensorflow does not have on the CPU")


def batch_norm(x, params=None, *, stats=None, eps=1e-5):
    """By nn.moments and nn.batch_normalization."""
    x = tf.transpose(x, (0, *range(2, len(x.shape)), 1))
    mean, variance = stats or tf.nn.moments(x, list(range(len(x.shape) - 1)))
    gamma, beta = params or (None, None)
    _refuse_cancelling(x, mean, variance, beta, gamma, eps)
    return _channels_first(tf.nn.batch_normalization(x, mean, variance, beta, gamma, eps))


def _refuse_cancelling(x, mean, variance, beta, gamma, eps):
    x, mean, variance, beta, gamma = (
        default if a is None else tf.cast(a, tf.float64).numpy()
        for a, default in ((x, 0), (mean, 0), (variance, 0), (beta, 0), (gamma, 1))
    )
    by = gamma / np.sqrt(variance + eps)
    centred = (x - mean) * by
    if (np.abs(mean * by) > 2 * (np.abs(centred) + np.abs(centred + beta))).any():
        raise Departure("tensorflow-batch-norm-cancels", "tensorflow 2.21 subtracts products, which nearly cancel here")


def embedding(table, *, ids, padding_idx):
    if padding_idx is not None:
        raise NotHandled("padding_idx")
    return tf.nn.embedding_lookup(table, ids)


EVERY_DTYPE = "float64", "float32", "bfloat16", "float16"
# Sums that are rounded to 16 bits after every term: sums of 600 random terms are off by up to 100 units in the last
# place, while the others are rounded once (docs/findings/tensorflow-16-bit-sums.md). Those of nn.avg_pool and of
# reduce_sum, in the gradients of what nn.batch_normalization broadcasts, are such sums in float16 only.
SUMS = {
    eager.out.name: eager._replace(name=f"{eager.name}, sums too", accumulator=eager.out)
    for eager in (ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"])
}
FLOAT16_SUMS = {"float16": SUMS["float16"]}


def _own_code():
    """The formats of 16 bits for which oneDNN has no kernels here: docs/findings/tensorflow-without-onednn.md."""
    for dtype, u in ((tf.bfloat16, 2.0**-7), (tf.float16, 2.0**-10)):
        if tf.einsum("ij,jk->ik", tf.constant([[1 + u, 1]], dtype), tf.constant([[1 + u], [-1 - 2 * u]], dtype)) == 0:
            yield dtype.name


OWN_SUMS = {name: SUMS[name] for name in _own_code()}

TARGETS = (
    Target("nn.softmax", "softmax", softmax, dtypes=EVERY_DTYPE),
    Target("nn.log_softmax", "log_softmax", log_softmax, dtypes=EVERY_DTYPE),
    Target("reduce_logsumexp", "logsumexp", logsumexp, dtypes=EVERY_DTYPE),
    Target("tensordot, nn.bias_add", "linear", linear, dtypes=EVERY_DTYPE),
    Target("matmul, nn.bias_add", "linear", linear_by_matmul, dtypes=EVERY_DTYPE),
    Target("nn.convolution", "conv", conv, dtypes=EVERY_DTYPE, arithmetic=OWN_SUMS),
    Target("nn.max_pool", "max_pool", max_pool, dtypes=EVERY_DTYPE, arithmetic=SUMS),
    Target("nn.avg_pool", "average_pool", average_pool, dtypes=EVERY_DTYPE, arithmetic=FLOAT16_SUMS | OWN_SUMS),
    Target("nn.batch_normalization", "batch_norm", batch_norm, dtypes=EVERY_DTYPE, arithmetic=FLOAT16_SUMS),
    Target("nn.embedding_lookup", "embedding", embedding, dtypes=EVERY_DTYPE, arithmetic=SUMS),
)
