"""Keras on TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # keras reads it when it is imported, once in a process

from refattn.frameworks import _keras, tensorflow
from refattn.oracle.arithmetic import ARITHMETICS

VERSION = _keras.version("tensorflow", tensorflow.VERSION)
run = tensorflow.run

# The product q k is stored in 16 bits, then scaled and all the softmax done in float32, then p cast (keras 3.15.1,
# src/backend/tensorflow/nn.py, _dot_product_attention_xla); backward, the softmax's own p is that of float32, and ds is
# scaled in float32 before it is cast. Its products are by einsum, and so are those of the layers with heads;
# layers.Attention has matmul, and TensorFlow's softmax. What these are without oneDNN's kernels is on the page
# tensorflow-without-onednn.
STORED = {"scaled_query": None, "score_roundings": 1, "probs_in_dscores": False, "scaled_dscores": True}
ATTENTION, SOFTMAX = {}, {}
for eager in (ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"]):
    low = eager.out
    sums = {"accumulator": low, "partial": low} if low.name in tensorflow.OWN_SUMS else {}
    ATTENTION[low.name] = eager._replace(name=f"{eager.name}, softmax in float32", **STORED, **sums)
    if sums:
        SOFTMAX[low.name] = eager._replace(name=f"{eager.name}, softmax too", softmax=low, exp_error=low.u)
OF_EINSUM = "layers.MultiHeadAttention", "layers.MultiHeadAttention, scores", "layers.GroupQueryAttention"
OF_WINDOWS = "layers.Conv1D, Conv2D, Conv3D", "layers.AveragePooling1D, 2D, 3D"
TARGETS = _keras.targets(
    arithmetic=ATTENTION,
    promises=dict.fromkeys(OF_EINSUM + OF_WINDOWS, tensorflow.OWN_SUMS) | {"layers.Attention": SOFTMAX},
)
