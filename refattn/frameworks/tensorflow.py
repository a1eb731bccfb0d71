"""TensorFlow: tensors in and out, gradients by a GradientTape, and what of it is cross-checked.

A target is a function called like the reference's forward, but with tensors. Adding one is adding a row to TARGETS.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what it says of the machine when it is imported

import numpy as np
import tensorflow as tf

from refattn.core import leaves, tree_map

VERSION = tf.__version__


def run(candidate, args, options, dout):
    """Call it with tensors: (result, gradients) in NumPy; no gradients where dout is None."""
    args = tree_map(tf.constant, tuple(args))
    options = {name: tree_map(_tensor, value) for name, value in options.items()}
    with tf.GradientTape(persistent=False) as tape:
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


TARGETS = ()
