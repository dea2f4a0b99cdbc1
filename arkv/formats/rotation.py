"""The fixed orthogonal matrix that coarse formats turn keys and values by (Hadamard; QuaRot, arXiv 2404.00456).

It spreads every channel over all, so that no single large one takes most of a token's range.
"""

from __future__ import annotations

import math
from functools import cache

import torch


@cache
def rotation(head_dim: int, device: torch.device) -> torch.Tensor:
    """The orthogonal matrix R [D, D], float32, that coarse formats turn rows by, ``x @ R``.

    The Kronecker product of a Hadamard matrix, for the powers of two in D, and a cosine transform for what is left.
    """
    power = head_dim & -head_dim
    rest = head_dim // power
    # Used with and without gradients, whatever the first caller is under.
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < power:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        place = torch.arange(rest, dtype=torch.float64)
        cosine = torch.cos(math.pi / rest * (place[:, None] + 0.5) * place) * math.sqrt(2.0)
        cosine[:, 0] = 1.0
        return (torch.kron(matrix, cosine) / math.sqrt(head_dim)).float().to(device)
