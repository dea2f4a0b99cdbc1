"""One layer of the tri-state cache, behind the layer interface of transformers' ``Cache``.

Letters: ``B`` batch, ``H`` KV heads, ``T`` tokens of one forward.

A layer keeps what concerns it alone: what its rows may hold, and how many tokens they have seen. What they hold lies in
the :class:`~arkv.store.Store` of all layers, or, while a first forward goes through the layers, in a part of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from arkv import parts
from arkv.budget import Slots
from arkv.config import CacheConfig
from arkv.grant import Grant
from arkv.measure import score_forward, update_scores
from arkv.parts import Block, InOrder, States
from arkv.pools import Part
from arkv.scores import PromptScores
from arkv.states import Tokens, assign
from arkv.store import COUNT, Store, column


class TriStateLayer(CacheLayerMixin):
    """One layer of a :class:`~arkv.TriStateCache`."""

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, config: CacheConfig, context_length: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config = config
        self.context_length = context_length
        # Positions take as few bytes as do their work.
        short = context_length is not None and context_length <= torch.iinfo(torch.int16).max
        self.position_dtype = torch.int16 if short else torch.int32
        self.seen: list[int] = []
        """Tokens that every sample has seen, padding included."""
        self.padded: list[int] = []
        """Padding tokens before each sample."""
        self.oq: list[float] = []
        """OQ score of each sample, from the first forward."""
        self.heads = 0
        self.cut = False
        """Something held was computed with gradients, which end here."""
        self.grant: Grant | None = None
        self.part: Part | None = None
        """What the layer holds until all layers have been computed."""
        self.store: Store | None = None
        self.index = 0
        """Number of the layer within the store."""

    # -- transformers' layer interface ---------------------------------------------------------------------------------

    @property
    def max_batch_size(self) -> int:
        """Batch size, 0 before the first forward."""
        return len(self.padded)

    batch_size = max_batch_size

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens held: position ids go on counting every token."""
        return max(self.seen, default=0)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the mask as of a cache that held everything; each layer makes its own from it.

        transformers 5.2 passes the positions of the queries, later versions their number.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens can be seen."""
        return -1

    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: storage is made by the first forward, which knows what has to be kept."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Not used: the cache takes keys and values itself."""
        raise NotImplementedError("TriStateCache.update takes the keys and values of all layers")

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.config, self.context_length)  # type: ignore[misc]

    def crop(self, max_length: int) -> None:
        """Not possible: what has been evicted or quantized cannot be brought back."""
        raise ValueError(
            "a tri-state cache cannot be cropped, since evicted tokens are gone: assisted generation and contrastive "
            "search need a full cache"
        )

    def fork(self) -> TriStateLayer:
        """A copy that can go its own way, but for what the store holds."""
        twin = object.__new__(TriStateLayer)
        twin.__dict__.update({key: list(v) if isinstance(v, list) else v for key, v in self.__dict__.items()})
        twin.grant = None if self.grant is None else self.grant.select(range(len(self.seen)))
        return twin

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices``, in that order; the store is another's concern."""
        samples = indices.tolist()
        for name in ("seen", "padded", "oq"):
            setattr(self, name, [getattr(self, name)[i] for i in samples])
        if self.grant is not None:
            self.grant = self.grant.select(samples)

    @staticmethod
    def join(layers: Sequence[TriStateLayer]) -> TriStateLayer:
        """One layer of the samples of all ``layers``, but for what the store holds."""
        twin = layers[0].fork()
        for name in ("seen", "padded", "oq"):
            setattr(twin, name, [item for layer in layers for item in getattr(layer, name)])
        twin.grant = Grant.join([layer.grant for layer in layers if layer.grant is not None])
        return twin

    # -- what is held --------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been computed yet."""
        return self.store is None and self.part is None

    @property
    def slots(self) -> list[Slots]:
        """Slots of each sample beside the window, once it has outgrown its limit; those of the first KV head."""
        assert self.grant is not None
        pairs = zip(self.grant.original, self.grant.quantized, strict=True)
        return [Slots(original[0], quantized[0]) for original, quantized in pairs]

    @property
    def limits(self) -> list[int]:
        """Tokens of each sample that the budget holds while all are Original."""
        assert self.grant is not None
        return [row[0] for row in self.grant.limit]

    def counts(self, sample: int = 0) -> list[torch.Tensor]:
        """Tokens that every KV head of a sample holds, [H], Original ones first."""
        rows = slice(sample * self.heads, (sample + 1) * self.heads)
        if self.store is None:
            return [] if self.part is None else [counts[rows] for counts in self.part.counts]
        begin = self.index * self.store.layer_rows
        table = self.store.rows[begin : begin + self.store.layer_rows]
        return [table[rows, column(number, COUNT)] for number in range(len(self.store.pools))]

    def held(self) -> Part:
        """What the layer holds, copied from the store."""
        if self.store is None:
            assert self.part is not None
            return self.part
        return self.store.part(self.index)

    def take_out(self) -> None:
        """Make a part of its own of what the layer holds in the store."""
        self.part, self.store = self.held(), None
        if self.config.quantizes and len(self.part.pools) == 1:
            parts.add_quantized(self.part, self.config.number_format)

    def reconstruct(self) -> InOrder:
        """The contiguous cache in sequence order."""
        return parts.reconstruct(self.held(), self.heads)

    def states(self, sample: int = 0) -> States:
        """Positions held of one sample and which of them are Quantized."""
        if self.is_empty:
            empty = torch.empty(0, 0)
            return States(empty.int(), empty.bool())
        return parts.states_of(self.held(), slice(sample * self.heads, (sample + 1) * self.heads))

    # -- a forward of several tokens -----------------------------------------------------------------------------------

    def measure(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        query: torch.Tensor,
        scaling: float,
        padding: torch.Tensor | None,
        stored: InOrder | None,
        scores: PromptScores | None = None,
    ) -> Block:
        """Score all tokens by the attention of the newest queries, and the layer by its first forward.

        Args:
            key, value: of the new tokens, [B, H, T, D].
            query: at least the newest queries of the new tokens that the scores are taken from
                (``CacheConfig.recorded_queries``), or all if there are fewer, [B, Hq, n, D].
            padding: bool [B, T], False where a new token is padding; None: none is.
            stored: the tokens of earlier forwards.
            scores: what this made of the same first forward before, to be taken over.

        Returns:
            The new tokens. The scores of those of earlier forwards are brought up to date in :attr:`part`.
        """
        batch, heads, length, _ = key.shape
        device = key.device
        if self.is_empty:
            self.heads, self.seen, self.padded, self.oq = heads, [0] * batch, [0] * batch, []
        if padding is not None:
            more = (~padding).sum(dim=1).tolist()
            self.padded = [before + new for before, new in zip(self.padded, more, strict=True)]
        seen = torch.tensor(self.seen, device=device)[:, None, None]
        position = (seen + torch.arange(length, device=device)).expand(batch, heads, length)
        if max(self.seen) + length > torch.iinfo(torch.int16).max:
            # Beyond the model's context a position can outgrow its number type, at the price of more bytes.
            self.position_dtype = torch.int32
        taken = torch.ones_like(position, dtype=torch.bool)
        if padding is not None:
            taken = padding[:, None, :].expand(batch, heads, length)
        if scores is None:
            scores = score_forward(key, value, query, scaling, padding, stored, position, self.padded, self.config)
        if not self.oq:
            self.oq = list(scores.oq)
        importance = scores.importance
        if stored is not None:
            old, importance = importance.split([importance.shape[2] - length, length], dim=2)
            update_scores(self.held(), old.flatten(0, 1), stored.order.flatten(0, 1), length, self.config)
        tokens = Tokens(importance.flatten(0, 1), position.flatten(0, 1), taken.flatten(0, 1))
        return Block(key, value, tokens, scores.stream)

    def begin(self, block: Block) -> None:
        """An empty part, for the first forward."""
        self.part = parts.first_part(block, self.position_dtype)
        if self.config.quantizes:
            parts.add_quantized(self.part, self.config.number_format)

    def absorb(self, block: Block) -> None:
        """Take the new tokens in, and fit all tokens to what the layer may hold."""
        assert self.grant is not None
        self.is_initialized = True
        length = block.key.shape[2]
        self.seen = [seen + length for seen in self.seen]
        self.grant.follow(self.tokens_seen())
        self.assign(block)

    def assign(self, block: Block | None = None) -> None:
        """Choose the state of every token anew, for the slots that the layer has now."""
        assert self.part is not None
        assert self.grant is not None
        block = parts.no_tokens(self.part) if block is None else block
        device = block.tokens.score.device
        rows = (torch.tensor(item, device=device) for item in (*self.rows_seen(), *self.row_slots()))
        seen, first, original, quantized = rows
        held = parts.padded(self.part, 0)
        tokens = Tokens(*(torch.cat(pair, dim=1) for pair in zip(held, block.tokens, strict=True)))
        stored = parts.padded(self.part, 1) if len(self.part.pools) > 1 and bool(self.part.counts[1].any()) else None
        choice = assign(tokens, stored, seen, first, original, quantized, self.config)
        quantizes = stored is not None or any(self.row_slots()[1])
        self.part = parts.rebuilt(self.part, block, choice, self.position_dtype, quantizes)

    def tokens_seen(self) -> list[int]:
        """Tokens that every sample has seen, without padding."""
        return [seen - padded for seen, padded in zip(self.seen, self.padded, strict=True)]

    def rows_seen(self) -> tuple[list[int], list[int]]:
        """Tokens seen of every row, and how many of them are padding."""
        seen = [number for number in self.seen for _ in range(self.heads)]
        return seen, [number for number in self.padded for _ in range(self.heads)]

    def row_slots(self) -> tuple[list[int], list[int]]:
        """Original and Quantized slots of every row beside the window."""
        assert self.grant is not None
        original, quantized = self.grant.now()
        return [slots for row in original for slots in row], [slots for row in quantized for slots in row]
