"""Products of half-precision weights on CPUs without instructions for them.

There torch has no fast product of two bfloat16 matrices: reading a prompt takes several times as long as in float32,
and most laptops are such machines. So the linear layers of a model keep a float32 copy of their weights beside them,
multiply in float32 and round the result once, which is what a processor with such instructions does too (bfloat16
factors, sums in float32). Activations, and with them the cache and its bytes, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

LARGEST_SHARE = 0.5
"""Of the free memory, that the copies may take."""


class LinearInFloat32(nn.Linear):
    """A linear layer of half-precision weights that multiplies in float32 and rounds the result once."""

    in_float32: Tensor
    """The weights once more, as float32; layers that share their weights share it."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(hidden.float(), self.in_float32, bias).to(hidden.dtype)


def cpu_instructions() -> str:
    """The vector instructions that products on this CPU use, such as ``AVX2`` or ``AVX512, bf16, amx``."""
    found = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        found.append("bf16")
    if torch.cpu._is_amx_tile_supported():
        found.append("amx")
    return ", ".join(found)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of ``dtype`` on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def multiply_in_float32(model: Any, free_bytes: int | None) -> bool:
    """Have the linear layers of a model on this CPU multiply in float32, where that is faster.

    Args:
        model: a transformers model whose parameters are on the CPU.
        free_bytes: memory that can still be taken; None where it is not known.

    Returns:
        Whether the layers were changed. They are not where the CPU has products of the weights' dtype, nor, which a
        line then says, where the copies would take more than :data:`LARGEST_SHARE` of the free memory.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and not multiplies(layer.weight.dtype)]
    distinct = {layer.weight.data_ptr(): layer.weight.numel() for layer in layers}
    if not layers:
        return False
    needed = 4 * sum(distinct.values())
    if free_bytes is not None and needed > LARGEST_SHARE * free_bytes:
        dtype = str(layers[0].weight.dtype).removeprefix("torch.")
        Console(stderr=True).print(
            f"This CPU has no instructions for products in {dtype}, and too little memory is free to make them in "
            f"float32 ({needed / 1e9:.1f} GB, and as much again): reading takes several times as long",
            highlight=False,
            soft_wrap=True,
        )
        return False
    copies: dict[int, Tensor] = {}
    for layer in layers:
        place = layer.weight.data_ptr()
        if place not in copies:
            copies[place] = layer.weight.detach().float()
        layer.__class__ = LinearInFloat32
        layer.in_float32 = copies[place]
    return True
