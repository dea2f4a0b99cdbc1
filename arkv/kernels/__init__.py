"""Kernels for GPUs, imported by need: Triton is not required."""

from arkv.kernels.decode import MAX_GROUP, MAX_HEAD_DIM, decode_attention, supported

__all__ = ["MAX_GROUP", "MAX_HEAD_DIM", "decode_attention", "supported"]
