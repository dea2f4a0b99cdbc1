"""Products of half-precision weights on CPUs: what keeps torch from being slow there.

On a CPU without instructions for them torch has no fast product of two bfloat16 matrices: reading a prompt takes
several times as long as in float32, and most laptops are such machines. So the linear layers of a model keep a float32
copy of their weights beside them, multiply in float32 and round the result once, which is what a processor with such
instructions does too (bfloat16 factors, sums in float32). Activations, and with them the cache and its bytes, stay as
they are.

On a CPU with such instructions torch puts all weights into the order that its products read them in, at every call: a
decoded token waits longer for that than for the product. So the layers keep a copy in that order. The results are the
same to the bit.
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

    ITEMSIZE = 4
    """Bytes of a copied weight."""
    copied: Tensor
    """The weights as float32; layers that share their weights share it."""

    @staticmethod
    def copy(weight: Tensor) -> Tensor:
        return weight.float()

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(hidden.float(), self.copied, bias).to(hidden.dtype)


class LinearInOrder(nn.Linear):
    """A linear layer of bfloat16 weights that lie in the order in which they are read."""

    ITEMSIZE = 2
    """Bytes of a copied weight."""
    copied: Tensor
    """The weights in an opaque layout of torch's; layers that share their weights share it."""

    @staticmethod
    def copy(weight: Tensor) -> Tensor:
        ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return ordered

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.copied, self.bias, "none", [], "")
        return output


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


def multiply_faster(model: Any, free_bytes: int | None) -> bool:
    """Give the linear layers of a model on this CPU copies of their weights with which products are faster.

    Args:
        model: a transformers model whose parameters are on the CPU, and need no gradients.
        free_bytes: memory that can still be taken; None where it is not known.

    Returns:
        Whether the layers were changed. They are not where torch has nothing faster for the weights' dtype, nor, which
        a line then says, where the copies would take more than :data:`LARGEST_SHARE` of the free memory.
    """
    found = [(layer, _faster(layer.weight.dtype)) for layer in model.modules() if type(layer) is nn.Linear]
    layers = [(layer, kind) for layer, kind in found if kind is not None]
    if not layers:
        return False
    needed = sum({layer.weight.data_ptr(): layer.weight.numel() * kind.ITEMSIZE for layer, kind in layers}.values())
    if free_bytes is not None and needed > LARGEST_SHARE * free_bytes:
        dtype = str(layers[0][0].weight.dtype).removeprefix("torch.")
        copies_take = f"({needed / 1e9:.1f} GB, and as much again)"
        Console(stderr=True).print(
            f"Too little memory is free for a copy of the weights in the order in which products in {dtype} read them "
            f"{copies_take}: decoding takes up to twice as long"
            if layers[0][1] is LinearInOrder
            else f"This CPU has no instructions for products in {dtype}, and too little memory is free to make them in "
            f"float32 {copies_take}: reading takes several times as long",
            highlight=False,
            soft_wrap=True,
        )
        return False
    copies: dict[int, Tensor] = {}
    for layer, kind in layers:
        place = layer.weight.data_ptr()
        if place not in copies:
            copies[place] = kind.copy(layer.weight.detach())
        layer.__class__ = kind
        layer.copied = copies[place]
    return True


def _faster(dtype: torch.dtype) -> type[LinearInFloat32] | type[LinearInOrder] | None:
    """The kind of layer whose products of ``dtype`` are faster on this CPU than those of ``nn.Linear``, if one is."""
    if not multiplies(dtype):
        return LinearInFloat32
    # In float32 another order changes the sums' last digits.
    return LinearInOrder if dtype == torch.bfloat16 else None
