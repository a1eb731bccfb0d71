"""Keras on JAX."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # keras reads it when it is imported, once in a process

from refattn.frameworks import _keras, jax

VERSION = _keras.version("jax", jax.VERSION)
run = jax.run
# jax.nn.dot_product_attention does it: products of what is stored, scores and softmax in float32, p cast.
TARGETS = _keras.targets(arithmetic={"bfloat16": "jax_cpu_bfloat16"}, times=1)  # every shape is compiled
