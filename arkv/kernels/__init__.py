"""Kernels: the operations of a decoding step (:mod:`arkv.kernels.twin` says what they do), quantizing, and the
attention of a prompt's newest queries. In C on CPUs, where they can be compiled (:mod:`arkv.kernels.cpu`); in Triton on
GPUs (:mod:`arkv.kernels.gpu`), imported by need; elsewhere in torch's operations."""

from __future__ import annotations

import torch

from arkv.kernels import operators
from arkv.kernels.cpu import quantize, reread, score

# Signatures are those of the twin, with `Store.tensors()` and the names of the Quantized pools' formats in the place of
# the pools; `attend` may be told `Store.widths` at last, so that a GPU needs not be asked how many slots there are.
make_room, attend, remember = torch.ops.arkv.make_room, torch.ops.arkv.attend, torch.ops.arkv.remember

__all__ = ["attend", "make_room", "operators", "quantize", "remember", "reread", "score"]
