"""Keras on TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # keras reads it when it is imported, once in a process

from refattn.frameworks import _keras, tensorflow
from refattn.oracle.arithmetic import ARITHMETICS

VERSION = _keras.version("tensorflow", tensorflow.VERSION)
run = tensorflow.run

# The product q k is stored in 16 bits, then scaled and all the softmax done in float32, then p cast (keras 3.15.1,
# src/backend/tensorflow/nn.py, _dot_product_attention_xla); backward, the softmax's own p is that of float32, and ds is
# scaled in float32 before it is cast.
STORED = {"scaled_query": None, "score_roundings": 1, "probs_in_dscores": False, "scaled_dscores": True}
TARGETS = _keras.targets(
    arithmetic={
        eager.out.name: eager._replace(name=f"{eager.name}, softmax in float32", **STORED)
        for eager in (ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"])
    }
)
