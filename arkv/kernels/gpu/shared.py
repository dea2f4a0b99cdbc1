"""What the Triton kernels of :mod:`arkv.kernels.gpu` share. Its modules beside the package itself import Triton.

Letters as there; ``P`` a size padded to a power of two.

Codes of fewer than 8 bits come as planes of ``RUNS`` codes to a byte (:mod:`arkv.formats.packing`).
"""

import triton
import triton.language as tl

from arkv import store

# Codes and numbers of half precision are exact in TF32; three products make up for what it cuts off the other factor.
PRECISION = tl.constexpr("tf32x3")

SEEN, FIRST = tl.constexpr(store.SEEN), tl.constexpr(store.FIRST)
START, COUNT, CAPACITY = (tl.constexpr(store.column(0, which)) for which in (store.START, store.COUNT, store.CAPACITY))
STORED_START, STORED_COUNT, STORED_CAPACITY = (
    tl.constexpr(store.column(1, which)) for which in (store.START, store.COUNT, store.CAPACITY)
)


@triton.jit
def place_of(relative, n_sink, window):
    """As ``store.place_of``."""
    return tl.where(relative < n_sink + window, relative, n_sink + (relative - n_sink) % window).to(tl.int32)
