"""What memory buys: for every method and budget the tokens and sequences that fit, and how fast they could be decoded.

Letters: ``N`` tokens of a sequence. Needs a model's config, no weights and no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.costs.gpus import GPUS
from bench.costs.plan import LOGIT_ROWS, USABLE, ModelSize, parse_bytes
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.records.row import Row
from tasks.errors import nearest


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What there is."""

    name: str
    nbytes: int
    bandwidth: float | None = None
    """Bytes a second; None where nobody says it."""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What one cell does with it at sequences of N tokens; of a method that does not say what its cache takes, nothing
    but its name."""

    cell: Cell
    bytes_per_token: float | None = None
    """KV bytes of a sequence over N."""
    pool_tokens: int | None = None
    """Tokens of such sequences in the memory that is left beside weights and a prefill."""
    longest: int | None = None
    """The longest sequence that fits alone, at most the model's context."""
    sequences: int | None = None
    """Of N tokens, side by side."""
    step_bytes: int | None = None
    """KV bytes that a decoding step of all of them reads."""
    tokens_per_s: float | None = None
    """Of all of them together, if a step took no longer than reading weights and KV bytes once: an upper bound."""


def memory_of(text: str, bandwidth: float | None = None) -> Memory:
    """A size such as ``80GB``, or a GPU of :data:`GPUS`.

    Args:
        bandwidth: GB/s, in the place of what the GPU's maker says.

    Raises:
        UserError: neither (the nearest GPU is named).
    """
    known = GPUS.get(text.lower())
    given = None if bandwidth is None else 1e9 * bandwidth
    if known is not None:
        return Memory(
            name=text.lower(),
            nbytes=known.memory,
            bandwidth=given or known.bandwidth,
            source="--bandwidth" if given else known.source,
        )
    if text[:1].isalpha():
        raise UserError(
            f"--capacity={text}: give a size such as 80GB, or a GPU: {nearest(text.lower(), GPUS)}", exit_code=2
        )
    return Memory(
        name=text, nbytes=parse_bytes(text, "--capacity"), bandwidth=given, source="--bandwidth" if given else ""
    )


def prefill_bytes(size: ModelSize, cell: Cell, tokens: int, chunk: int | None) -> int:
    """What reading a prompt of N tokens takes at its largest moment beside weights and what is kept: keys and values
    before they are compressed (:meth:`bench.methods.base.Method.reading_bytes`), the widest product of a layer and its
    input, and logits."""
    read = min(tokens, chunk or tokens)
    widest = 3 * read * size.intermediate * size.itemsize
    return cell.impl.reading_bytes(size, tokens) + widest + LOGIT_ROWS * size.vocabulary * 4


def free_bytes(size: ModelSize, memory: Memory) -> int:
    """Bytes beside the weights. Raises :class:`UserError` where these do not fit."""
    free = int(USABLE * memory.nbytes) - size.weights_bytes
    if free <= 0:
        least = size.weights_bytes / USABLE
        raise UserError(
            f"{memory.name}: the weights take {size.weights_bytes / 1e9:.1f} GB and {USABLE:.0%} of "
            f"{memory.nbytes / 1e9:.1f} GB can be used: {least / 1e9:.1f} GB would hold them, or several GPUs"
        )
    return free


def capacity(
    size: ModelSize, cells: Sequence[Cell], memory: Memory, tokens: int, chunk: int | None = None
) -> list[Capacity]:
    """What ``memory`` buys at sequences of ``tokens`` tokens, one for each cell.

    Args:
        chunk: tokens of a prompt that are read at once; None: all.

    Raises:
        UserError: the weights alone do not fit.
    """
    free = free_bytes(size, memory)
    found = []
    for cell in cells:
        kept = size.kv_bytes(cell, tokens)
        if not kept:
            found.append(Capacity(cell=cell))
            continue
        pool = max(free - prefill_bytes(size, cell, tokens, chunk), 0)
        sequences = pool // kept
        step = sequences * kept
        rate = None
        if memory.bandwidth is not None and sequences:
            rate = sequences * memory.bandwidth / (size.weights_bytes + step)
        found.append(
            Capacity(
                cell=cell,
                bytes_per_token=kept / tokens,
                pool_tokens=pool * tokens // kept,
                longest=_longest(size, cell, free, chunk),
                sequences=sequences,
                step_bytes=step,
                tokens_per_s=rate,
            )
        )
    return found


def _longest(size: ModelSize, cell: Cell, free: int, chunk: int | None) -> int:
    """Tokens of the longest sequence that fits alone."""

    def fits(tokens: int) -> bool:
        return (size.kv_bytes(cell, tokens) or 0) + prefill_bytes(size, cell, tokens, chunk) <= free

    low, high = 0, size.context or 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def scores_kept(rows: Sequence[Row], cells: Sequence[Cell]) -> Mapping[tuple[str, str], Mapping[str, Row]]:
    """Of a run the rows of these cells, by task and its first metric, and by the cell's key.

    Raises:
        UserError: it has none of them.
    """
    keys = {cell.key for cell in cells}
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.task, row.metric)
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.cell in keys and row.metric == first[row.task]:
            found.setdefault((row.task, row.metric), {})[row.cell] = row
    if not any(row.method != "full" for chosen in found.values() for row in chosen.values()):
        raise UserError("--run: that run has none of these methods at these budgets: ask for those that it measured")
    return found
