"""The weights of a GGUF file under transformers' names, unpacked to bfloat16 one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bench.errors import UserError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

_BLOCK = 1 << 22
"""So many weights at most are held in float32 at once."""


def unpacked_size(reader: GGUFReader) -> int:
    """Bytes of all weights in bfloat16."""
    return 2 * sum(int(tensor.n_elements) for tensor in reader.tensors)


def fill(model: Any, reader: GGUFReader, name: str, architecture: str, progress: Callable[[int], None]) -> None:
    """Give ``model``, whose parameters are on the meta device, the weights of the file.

    Memory: the weights in bfloat16, a block of one tensor in float32, and what the system keeps of the file.

    Args:
        model: a transformers model of the file's configuration.
        name: of the file, for errors.
        progress: told after each tensor how many bytes of bfloat16 are there.

    Raises:
        UserError: a weight has no place in the model, or a place no weight.
    """
    from bench.models.library import check_complete

    places = dict(_places(model, architecture))
    weights: dict[str, torch.Tensor] = {}
    done = 0
    for tensor in reader.tensors:
        if tensor.name not in places:
            raise UserError(f"{name} holds {tensor.name}, for which transformers' {architecture} has no place")
        weight = _bfloat16(tensor)
        if architecture == "llama" and ".attn_q." in tensor.name:
            weight = _unpermuted(weight, model.config.num_attention_heads)
        elif architecture == "llama" and ".attn_k." in tensor.name:
            weight = _unpermuted(weight, model.config.num_key_value_heads)
        weights[places[tensor.name]] = weight
        done += weight.nbytes
        progress(done)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    lacking = [key for key, weight in model.state_dict().items() if weight.is_meta]
    check_complete({"missing_keys": lacking}, name)


def _places(model: Any, architecture: str) -> Iterator[tuple[str, str]]:
    """The GGUF names of a model's weights, and their own."""
    import gguf

    kind = next(kind for kind, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for key in model.state_dict():
        module, _, suffix = key.rpartition(".")
        if known := names.get_name(module):
            yield f"{known}.{suffix}", key


def _bfloat16(tensor: ReaderTensor) -> torch.Tensor:
    """``[rows, columns]`` or ``[columns]``, rounded from what the file's number format stands for in float32."""
    import torch
    from gguf import dequantize

    weight = torch.empty([int(length) for length in reversed(tensor.shape)], dtype=torch.bfloat16)
    rows, packed = weight.view(-1, weight.shape[-1]), tensor.data.reshape(-1, tensor.data.shape[-1])
    step = max(1, _BLOCK // rows.shape[1])
    for begin in range(0, len(rows), step):
        rows[begin : begin + step] = torch.tensor(dequantize(packed[begin : begin + step], tensor.tensor_type))
    return weight


def _unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in transformers' order, first halves of all rotated pairs before second halves.

    llama.cpp has the two of a pair beside each other for Llama models.
    """
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, pairs, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
