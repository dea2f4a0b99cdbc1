"""Decoding steps of many layers at once: which token gives its slot to the new one, and what attention says of it.

Letters: ``L`` layers of the group, ``B`` batch, ``H`` KV heads, ``S`` slots, ``D`` head dim, ``W`` window.

What a step does to one layer is a few dozen operations on a handful of numbers; done layer by layer, starting them
takes longer than attention. So a group of layers keeps each kind of storage in one tensor, of which every layer has a
part, and does the step for all of them before the first layer computes and after the last one has.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from arkv.attention import refuse_gradients
from arkv.config import CacheConfig
from arkv.layer import TriStateLayer
from arkv.quantization import QuantizedTensor
from arkv.scoring import pool, update_scores
from arkv.storage import CLOSED


class LayerGroup:
    """Layers of the same shape on one device, in the order in which they are computed.

    Args:
        config: the settings of their cache.
        layers: layers that have absorbed a prompt.
    """

    def __init__(self, config: CacheConfig, layers: Sequence[TriStateLayer]) -> None:
        self.config = config
        self.layers = list(layers)
        self.order: torch.Tensor | None = None
        """[L * B, H, S]: all slots in sequence order, Quantized ones numbered after the Original ones, as long as every
        slot is taken and all layers have as many."""
        self._rows: tuple[torch.Tensor, ...] = ()
        self._given: tuple[torch.Tensor, ...] = ()
        """Key and value of the layer whose attention is to come, as the model has made them."""
        self._probabilities: list[torch.Tensor] = []

    # -- a step, as the layers see it ----------------------------------------------------------------------------------

    def join(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one new token [B, H, 1, D] of layer ``index`` of the group into the slot that is made free for it."""
        if index == 0:
            self._begin()
        # What is stored takes no part in gradients.
        self._given = (key, value)
        self.layers[index].note_gradients(key, value)
        for store, new in ((self._key, key), (self._value, value)):
            store.index_copy_(0, self._rows[index], new.detach().reshape(-1, new.shape[-1]))
        self.layers[index].seen += 1
        if index + 1 == len(self.layers):
            self._rows = ()

    def attend(self, index: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention output [B, 1, Hq, D] of the new token; its probabilities are the new scores of what is held."""
        layer = self.layers[index]
        output, probabilities = layer.attend_step(query, scaling)
        if self.config.ranking == "heavy_hitter":
            self._probabilities.append(probabilities)
            if len(self._probabilities) == len(self.layers):
                self._finish()
        given, self._given = self._given, ()
        return refuse_gradients(output, query, *given) if layer.cut or query.requires_grad else output

    # -- all layers at once --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Find the Original slot for the new token in all layers: a free one, or that of the least important token
        outside the window, which is quantized or evicted."""
        layers = self.layers
        before = [layer.used for layer in layers]
        free = [layer.make_room() for layer in layers]
        if before != [layer.used for layer in layers]:
            self.order = None
        if not all(layer.bound for layer in layers):
            self._bind()
        seen = layers[0].seen
        tokens = [layer.held() for layer in layers]
        score = _stack([part.score for part in tokens], CLOSED)
        inside = _stack([part.position for part in tokens], 0) > seen - self.config.window_size
        place = score.masked_fill_(inside, CLOSED).argmin(dim=-1)
        if any(free):
            last = [layer.used - 1 if is_free else -1 for layer, is_free in zip(layers, free, strict=True)]
            newest = torch.tensor(last, device=place.device).unsqueeze(1)
            place = torch.where(newest >= 0, newest, place)
        rows = place + torch.tensor(self._first_original, device=place.device)
        flat = rows.view(-1)
        target = self._demote(flat, free)
        if self.order is not None:
            self._reorder(place, target)
        self._position.index_fill_(0, flat, seen)
        self._score.index_copy_(0, flat, self._new_scores(seen).to(flat.device))
        self._rows = rows.unbind(0)
        self._probabilities = []

    def _new_scores(self, seen: int) -> torch.Tensor:
        """Scores of the new token, [L * B * H]; attention sinks stand above all others."""
        usual = float(seen) if self.config.ranking == "recency" else 0.0
        heads = self.layers[0].held().position.shape[1]
        padded = self.layers[0].padded
        scores = [CLOSED if seen < before + self.config.n_sink else usual for before in padded]
        return torch.tensor(scores).repeat_interleave(heads).repeat(len(self.layers))

    def _demote(self, rows: torch.Tensor, free: Sequence[bool]) -> torch.Tensor | None:
        """Quantize the tokens in ``rows`` [L * B * H] into the slots of less important Quantized ones, or evict them.

        Returns:
            The number, among all slots of its layer, of the slot that each now has, -1 if it is evicted, [L, B * H];
            None where there are no Quantized slots.
        """
        if all(layer.quantized is None for layer in self.layers):
            return None
        empty = self._score.new_empty(*self.layers[0].held().position.shape[:2], 0)
        stored = [empty if layer.quantized is None else layer.quantized.score for layer in self.layers]
        least, target = _stack(stored, CLOSED).min(dim=-1)
        score, position = self._score.index_select(0, rows), self._position.index_select(0, rows)
        valid = (score > least.view(-1)) & (position >= 0)
        if any(free):
            valid &= ~torch.tensor(free, device=rows.device).repeat_interleave(least.shape[1])
        chosen = valid.nonzero().squeeze(1)
        if chosen.numel():
            into = (target + torch.tensor(self._first_quantized, device=rows.device)).view(-1).index_select(0, chosen)
            rows = rows.index_select(0, chosen)
            heads = torch.tensor(self._low_heads, device=rows.device).index_select(0, chosen)
            self._low_key.write(into, self._key.index_select(0, rows), heads)
            self._low_value.write(into, self._value.index_select(0, rows), heads)
            self._low_position.index_copy_(0, into, position.index_select(0, chosen))
            self._low_score.index_copy_(0, into, score.index_select(0, chosen))
        used = torch.tensor([[layer.used] for layer in self.layers], device=rows.device)
        return torch.where(valid.view(target.shape), target + used, -1)

    def _reorder(self, place: torch.Tensor, target: torch.Tensor | None) -> None:
        """Keep :attr:`order` up to date.

        Args:
            place: Original slot that the new token takes, [L, B * H].
            target: slot that its former token takes, -1 if it is evicted; None: there are no Quantized slots.
        """
        assert self.order is not None
        order = self.order
        place = place.view(*order.shape[:2], 1).to(order.dtype)
        gone = place
        if target is not None:
            target = target.view(place.shape).to(order.dtype)
            gone = torch.where(target >= 0, target, place)
        # Everything behind the slot that is gone moves up by one, and the new token is the last.
        shift = (order == gone).cumsum(dim=-1) + torch.arange(order.shape[-1], device=order.device)
        if target is not None:
            order = torch.where((order == place) & (target >= 0), target, order)
        self.order = torch.cat([order, place], dim=-1).gather(2, shift)

    def _finish(self) -> None:
        """Turn the attention of the step into scores."""
        layers, probabilities = self.layers, self._probabilities
        self._probabilities = []
        if len({part.shape[-1] for part in probabilities}) == 1:
            together = torch.cat(probabilities).mean(dim=2)
            if self._pools:
                order = self.order
                if order is None:
                    order = self._sequence(layers)
                    # It may take as many bytes as positions do: kept in these, or else made anew at every step.
                    dtype = layers[0].held().position.dtype
                    if all(layer.holds_most for layer in layers) and order.shape[-1] - 1 <= torch.iinfo(dtype).max:
                        self.order = order.to(dtype)
                together = self._smooth(together, order)
            importance = list(together.split(probabilities[0].shape[0]))
        else:
            # Layers of different size, as where they share bytes by their OQ ratios.
            importance = [part.mean(dim=2) for part in probabilities]
            if self._pools:
                orders = [self._sequence([layer]) for layer in layers]
                importance = [self._smooth(part, order) for part, order in zip(importance, orders, strict=True)]
        scores, newest = [], []
        for layer, numbers in zip(layers, importance, strict=True):
            scores += layer.scores()
            newest += layer.split(numbers)
        finite = not self.config.n_sink and all(layer.holds_most for layer in layers)
        update_scores(scores, newest, self.config, 1, finite)

    @property
    def _pools(self) -> bool:
        """Whether the newest attention is pooled over neighbouring tokens of the evictable region.

        The region is what can leave at the next step: all but the window, and the token that leaves it next.
        """
        return self.config.pools_steps and self.layers[0].seen >= self.config.window_size

    @staticmethod
    def _sequence(layers: Sequence[TriStateLayer]) -> torch.Tensor:
        """All slots of ``layers`` in sequence order, [L * B, H, S]."""
        parts = [
            [layer.held().position, *([] if layer.quantized is None else [layer.quantized.position])]
            for layer in layers
        ]
        positions = torch.cat([torch.cat(part, dim=-1) for part in parts])
        return positions.argsort(dim=-1)

    def _smooth(self, importance: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """``importance`` [n, H, S], pooled in sequence order."""
        region = order[..., : order.shape[-1] - self.config.window_size + 1].long()
        return importance.scatter(2, region, pool(importance.gather(2, region), self.config.pool_width))

    # -- storage -------------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Bring each kind of storage of all layers into one tensor."""
        layers = self.layers
        self.order = None
        tokens = [layer.tokens for layer in layers if layer.tokens is not None]
        self._first_original = _first_rows([part.position for part in tokens])
        self._key = _join_storage(tokens, "key")
        self._value = _join_storage(tokens, "value")
        self._position = _join_storage(tokens, "position")
        self._score = _join_storage(tokens, "score")
        pools = [layer.quantized for layer in layers if layer.quantized is not None]
        if pools:
            shape = tokens[0].position.shape[:2]
            none = torch.empty(*shape, 0)
            self._first_quantized = _first_rows(
                [none if layer.quantized is None else layer.quantized.position for layer in layers]
            )
            # Head of each of all layers among those of the layers that have a pool.
            has_pool = torch.tensor([layer.quantized is not None for layer in layers])
            self._low_heads = (has_pool.repeat_interleave(shape[0] * shape[1]).cumsum(0) - 1).tolist()
            self._low_key = _join_quantized([pool.key for pool in pools])
            self._low_value = _join_quantized([pool.value for pool in pools])
            self._low_position = _join_storage(pools, "position")
            self._low_score = _join_storage(pools, "score")
        for layer in layers:
            layer.bound = True


def _stack(parts: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """Tensors [B, H, n] of all layers as one, [L, B * H, largest n], shorter ones filled up."""
    if len({part.shape[-1] for part in parts}) == 1:
        return torch.stack([part.flatten(0, 1) for part in parts])
    columns = [part.flatten(0, 1).T for part in parts]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=fill).transpose(1, 2)


def _first_rows(slots: Sequence[torch.Tensor]) -> list[list[int]]:
    """Row of the first slot of each layer, sample and head, [L][B * H], in tensors that hold those of all layers."""
    rows, start = [], 0
    for part in slots:
        count = part.shape[-1]
        heads = part.shape[0] * part.shape[1]
        rows.append([start + count * head for head in range(heads)])
        start += count * heads
    return rows


def _join_storage(owners: Sequence[object], name: str) -> torch.Tensor:
    """Attribute ``name`` of all owners, [B, H, n, ...] each, in one tensor [rows, ...]; each owner keeps its part."""
    tensors: list[torch.Tensor] = [getattr(owner, name) for owner in owners]
    whole = torch.cat([tensor.flatten(0, 2) for tensor in tensors])
    parts = whole.split([tensor.shape[0] * tensor.shape[1] * tensor.shape[2] for tensor in tensors])
    for owner, tensor, part in zip(owners, tensors, parts, strict=True):
        setattr(owner, name, part.view(tensor.shape))
    return whole


def _join_quantized(owners: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The same for quantized tensors."""
    whole = copy.copy(owners[0])
    whole.codes, whole.scale = _join_storage(owners, "codes"), _join_storage(owners, "scale")
    whole.zero = None if owners[0].zero is None else _join_storage(owners, "zero")
    whole.center = None if owners[0].center is None else _join_storage(owners, "center")
    return whole
