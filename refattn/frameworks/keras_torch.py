"""Keras on PyTorch."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # keras reads it when it is imported, once in a process

from refattn.frameworks import _keras, torch

VERSION = _keras.version("torch", torch.VERSION)
run = torch.run
# torch's fused kernel, or its math backend, which rounds less.
TARGETS = _keras.targets(arithmetic=torch.FUSED, promises={"layers.Conv1D, Conv2D, Conv3D": torch.CONV_SUMS})
