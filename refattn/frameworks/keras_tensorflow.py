"""Keras on TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # keras reads it when it is imported, once in a process

from refattn.frameworks import _keras, tensorflow
from refattn.oracle.arithmetic import ARITHMETICS

VERSION = _keras.version("tensorflow", tensorflow.VERSION)
run = tensorflow.run

# The product q k is stored in 16 bits, then scaled and all the softmax done in float32, then p cast (keras 3.15.1,
# src/backend/tensorflow/nn.py, _dot_product_attention_xla); backward, the softmax's own p is that of float32, and ds is
# scaled in float32 before it is cast. Its products are by einsum, and so are those of the layers with heads.
STORED = {"scaled_query": None, "score_roundings": 1, "probs_in_dscores": False, "scaled_dscores": True}
SUMS = {name: {"accumulator": own.accumulator, "partial": own.accumulator} for name, own in tensorflow.OWN_SUMS.items()}
ATTENTION = {
    eager.out.name: eager._replace(name=f"{eager.name}, softmax in float32", **STORED | SUMS.get(eager.out.name, {}))
    for eager in (ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"])
}
SOFTMAX = {  # that of TensorFlow's own code
    name: own._replace(name=f"{own.name}, and softmax", softmax=own.out, exp_error=own.out.u, partial=own.out)
    for name, own in tensorflow.OWN_SUMS.items()
}
OF_HEADS = "layers.MultiHeadAttention", "layers.MultiHeadAttention, scores", "layers.GroupQueryAttention"
OF_WINDOWS = "layers.Conv1D, Conv2D, Conv3D", "layers.AveragePooling1D, 2D, 3D"
TARGETS = _keras.targets(
    arithmetic=ATTENTION,
    promises=dict.fromkeys((*OF_HEADS, "layers.Attention", "layers.AdditiveAttention"), SOFTMAX)
    | dict.fromkeys(OF_WINDOWS, tensorflow.OWN_SUMS),
)
