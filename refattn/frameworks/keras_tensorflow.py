"""Keras on TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # keras reads it when it is imported, once in a process

from refattn.frameworks import _keras, tensorflow
from refattn.oracle.arithmetic import ARITHMETICS

VERSION = _keras.version("tensorflow", tensorflow.VERSION)
run = tensorflow.run

# The product q k is stored in 16 bits, then scaled and all the softmax done in float32, then p cast (keras 3.15.1,
# src/backend/tensorflow/nn.py, _dot_product_attention_xla); backward, the softmax's own p is that of float32.
STORED = ARITHMETICS["bf16_eager"]._replace(scaled_query=None, score_roundings=1, probs_in_dscores=False)
TARGETS = _keras.targets(arithmetic={"bfloat16": STORED})
