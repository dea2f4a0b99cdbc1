"""True bytes: the sum of all tensor storage that an object holds, never a nominal ratio."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def tensors_of(*objects: Any) -> Iterable[torch.Tensor]:
    """Every plain tensor reachable from ``objects`` through attributes, containers and tensor subclasses."""
    seen: set[int] = set()
    stack = list(objects)
    while stack:
        item = stack.pop()
        if isinstance(item, (str, bytes, int, float, bool, type, type(None))) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            # A cache may point back at the model that it serves; weights are no part of a cache.
            continue
        if isinstance(item, torch.Tensor):
            flatten = getattr(item, "__tensor_flatten__", None)
            if flatten is None:
                yield item
            else:
                # A subclass reports the shape that it stands for; what it holds is in its inner tensors.
                stack.extend(getattr(item, name) for name in flatten()[0])
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            stack.extend(item)
        else:
            stack.extend(getattr(item, "__dict__", {}).values())
            for base in type(item).__mro__:
                slots = getattr(base, "__slots__", ())
                stack.extend(getattr(item, name, None) for name in ([slots] if isinstance(slots, str) else slots))


def storage_bytes(*objects: Any) -> int:
    """Bytes of all distinct tensor storages reachable from ``objects``."""
    storages = {}
    for tensor in tensors_of(*objects):
        storage = tensor.untyped_storage()
        storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
