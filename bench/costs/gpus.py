"""Memory and bandwidth of GPUs that are often used, as their makers state them."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """What a maker says of a GPU."""

    memory: int
    """Bytes."""
    bandwidth: float
    """Of its memory, in bytes a second."""
    source: str


_GB, _TB = 10**9, 1e12

GPUS = {
    "a10": Gpu(24 * _GB, 0.600 * _TB, "NVIDIA A10 datasheet"),
    "a100-40gb": Gpu(40 * _GB, 1.555 * _TB, "NVIDIA A100 datasheet"),
    "a100-80gb": Gpu(80 * _GB, 2.039 * _TB, "NVIDIA A100 datasheet, SXM"),
    "b200": Gpu(180 * _GB, 8.0 * _TB, "NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s for eight"),
    "h100": Gpu(80 * _GB, 3.35 * _TB, "NVIDIA H100 datasheet, SXM"),
    "h100-pcie": Gpu(80 * _GB, 2.0 * _TB, "NVIDIA H100 PCIe datasheet"),
    "h200": Gpu(141 * _GB, 4.8 * _TB, "NVIDIA H200 datasheet"),
    "l4": Gpu(24 * _GB, 0.300 * _TB, "NVIDIA L4 datasheet"),
    "l40s": Gpu(48 * _GB, 0.864 * _TB, "NVIDIA L40S datasheet"),
    "mi300x": Gpu(192 * _GB, 5.3 * _TB, "AMD Instinct MI300X datasheet"),
    "rtx-3090": Gpu(24 * _GB, 0.936 * _TB, "NVIDIA GeForce RTX 3090 specifications"),
    "rtx-4090": Gpu(24 * _GB, 1.008 * _TB, "NVIDIA GeForce RTX 4090 specifications"),
    "t4": Gpu(16 * _GB, 0.320 * _TB, "NVIDIA T4 datasheet"),
}
