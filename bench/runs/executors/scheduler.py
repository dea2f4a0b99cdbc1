"""Which unit goes to which worker, and what happens to the units of a worker that is gone.

Nothing here knows how workers are run. A unit is in exactly one place at any moment: not yet read from the source,
waiting, with one worker, or done; so none is lost and none is counted twice.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.runs.executors.base import Unit

DEPTH = 2
"""Units that a worker has at once: one it works on, and the next one, so that it never waits for the driver."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A unit on its way, and how many workers were lost or failed over it."""

    unit: Unit
    losses: int = 0


class Scheduler:
    """Hands units out in their order, but those that were lost before all others and, once all have been read, the
    largest first, so that all workers end at about the same time.

    What waits is bounded: the source is read no further ahead than two units for each worker. A worker gets units of
    the model that it has as long as there are any.

    Args:
        units: the source, read as needed.
        retries: how often a unit is tried again after it was lost; then it is given up. The last try is one document at
            a time, so that one which kills its worker takes no other with it.
    """

    def __init__(self, units: Iterable[Unit], retries: int) -> None:
        self._source: Iterator[Unit] | None = iter(units)
        self.retries = retries
        self._waiting: dict[str, list[tuple[int, int, int, Ticket]]] = {}
        """A heap for each model."""
        self.waiting = 0
        """Units read and with no worker."""
        self._workers: dict[str, deque[Ticket]] = {}
        self._holding: list[dict[str, None]] = [{} for _ in range(DEPTH + 1)]
        """Workers by how many units each has."""
        self._models: dict[str, str] = {}
        """Of the newest unit of each worker."""
        self._count = 0

    @property
    def workers(self) -> int:
        """Workers that are there."""
        return len(self._workers)

    @property
    def in_flight(self) -> int:
        """Units that workers have."""
        return sum(map(len, self._workers.values()))

    @property
    def finished(self) -> bool:
        """Everything is done or given up. Known once the source has been read to its end."""
        return self._source is None and not self.waiting and not self.in_flight

    def join(self, worker: str) -> None:
        """A new worker, ready to work."""
        self._workers[worker] = deque()
        self._holding[0][worker] = None

    def assign(self) -> Iterator[tuple[str, Ticket]]:
        """What to hand out now: to workers without any unit first, then one more for each."""
        self._read()
        for held, workers in enumerate(self._holding[:-1]):
            # Towards the end, a unit that waits behind another one could be done by somebody else.
            while workers and self.waiting and (held == 0 or self._source is not None):
                worker = next(iter(workers))
                ticket = self._next(self._models.get(worker))
                self._models[worker] = ticket.unit.model
                self._move(worker, held, held + 1)
                self._workers[worker].append(ticket)
                yield worker, ticket
                self._read()

    def _move(self, worker: str, before: int, after: int) -> None:
        del self._holding[before][worker]
        self._holding[after][worker] = None

    def _read(self) -> None:
        while self._source is not None and self.waiting < 2 * max(1, len(self._workers)):
            unit = next(self._source, None)
            if unit is None:
                self._source = None
                for model, heap in self._waiting.items():
                    self._waiting[model] = [self._entry(ticket, count) for *_, count, ticket in heap]
                    heapq.heapify(self._waiting[model])
            else:
                self._wait(Ticket(unit))

    def _wait(self, ticket: Ticket) -> None:
        self._count += 1
        self.waiting += 1
        heapq.heappush(self._waiting.setdefault(ticket.unit.model, []), self._entry(ticket, self._count))

    def _entry(self, ticket: Ticket, count: int) -> tuple[int, int, int, Ticket]:
        size = 0 if self._source is not None else ticket.unit.cost
        return -ticket.losses, -size, count, ticket

    def _next(self, model: str | None) -> Ticket:
        if model not in self._waiting:
            model = next(iter(self._waiting))
        assert model is not None
        *_, ticket = heapq.heappop(self._waiting[model])
        if not self._waiting[model]:
            del self._waiting[model]
        self.waiting -= 1
        return ticket

    def done(self, worker: str, ticket: Ticket, remaining: Unit | None = None) -> Unit | None:
        """The worker has answered a unit, all but ``remaining``, which another one should try.

        Returns what of it is given up.
        """
        tickets = self._workers[worker]
        tickets.remove(ticket)
        self._move(worker, len(tickets) + 1, len(tickets))
        return None if remaining is None else self._again(Ticket(remaining, ticket.losses))

    def leave(self, worker: str) -> Unit | None:
        """A worker is gone. Its units wait again; the one that it was working on may be given up, and is returned."""
        self._models.pop(worker, None)
        tickets = self._workers.pop(worker)
        del self._holding[len(tickets)][worker]
        for ticket in list(tickets)[1:]:
            self._wait(ticket)
        return self._again(tickets[0]) if tickets else None

    def _again(self, ticket: Ticket) -> Unit | None:
        if ticket.losses >= self.retries:
            return ticket.unit
        losses = ticket.losses + 1
        for unit in ticket.unit.split() if losses == self.retries else [ticket.unit]:
            self._wait(Ticket(unit, losses))
        return None
