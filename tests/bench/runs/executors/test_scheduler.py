"""The scheduler without any cluster: simulated workers that die at random."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from bench.methods.grid import full_cell
from bench.runs.executors.base import Unit
from bench.runs.executors.scheduler import DEPTH, Scheduler, Ticket
from tasks.base import Document, Generate

FULL = (full_cell(),)


def unit(name: str, seconds: int = 1, model: str = "tiny", documents: int = 1) -> Unit:
    """A unit that costs, and in the simulation takes, so many seconds per document."""
    request = Generate(prompt_ids=(0,) * seconds, max_new_tokens=0)
    work = tuple((Document(id=f"{name}.{place}", request=request), FULL) for place in range(documents))
    return Unit(model=model, task="toy", work=work)


def names(found: Unit) -> list[str]:
    return [document.id for document, _ in found.work]


class Simulation:
    """Workers in simulated time, each of which dies with probability ``death`` in the midst of a unit."""

    def __init__(self, units: list[Unit], workers: int, death: float, retries: int, restart: float = 100) -> None:
        self.random = random.Random(0)
        self.read = 0
        self.scheduler = Scheduler(self.source(units), retries)
        self.death, self.restart = death, restart
        self.events: list[tuple[float, int, str, Ticket | None]] = []
        self.queues: dict[str, list[Ticket]] = {}
        self.done: Counter[str] = Counter()
        self.given_up: Counter[str] = Counter()
        self.most_held = 0
        self.now = 0.0
        for worker in range(workers):
            self.join(f"w{worker}")

    def source(self, units: list[Unit]) -> Iterator[Unit]:
        for item in units:
            self.read += 1
            yield item

    def join(self, worker: str) -> None:
        self.queues[worker] = []
        self.scheduler.join(worker)

    def begin(self, worker: str) -> None:
        """The worker's first unit: it will be done, or the worker dies over it."""
        ticket = self.queues[worker][0]
        seconds = float(ticket.unit.cost)
        dies = self.random.random() < self.death
        after = seconds * self.random.random() if dies else seconds
        heapq.heappush(self.events, (self.now + after, len(self.events), worker, None if dies else ticket))

    def hand_out(self) -> None:
        for worker, ticket in self.scheduler.assign():
            self.queues[worker].append(ticket)
            if len(self.queues[worker]) == 1:
                self.begin(worker)
        held = self.scheduler.waiting + self.scheduler.in_flight
        self.most_held = max(self.most_held, held)
        assert self.read - sum(self.done.values()) - sum(self.given_up.values()) <= held

    def run(self) -> float:
        """The time that it took."""
        self.hand_out()
        while not self.scheduler.finished:
            self.now, _, worker, ticket = heapq.heappop(self.events)
            if worker not in self.queues:
                self.join(worker)
            elif ticket is None:
                del self.queues[worker]
                lost = self.scheduler.leave(worker)
                self.given_up.update(names(lost) if lost else ())
                heapq.heappush(self.events, (self.now + self.restart, len(self.events), f"{worker}'", None))
            else:
                assert self.queues[worker].pop(0) is ticket
                self.done.update(names(ticket.unit))
                self.scheduler.done(worker, ticket)
                if self.queues[worker]:
                    self.begin(worker)
            self.hand_out()
        return self.now


def test_ten_thousand_units_on_a_thousand_workers_that_die() -> None:
    draw = random.Random(1)
    units = [unit(f"u{place}", draw.randint(50, 150)) for place in range(10_000)]
    workers = 1_000
    simulation = Simulation(units, workers, death=0.01, retries=3)
    seconds = simulation.run()
    # Every document once: none lost, none doubled.
    assert set(simulation.done.values()) == {1}
    assert len(simulation.done) + len(simulation.given_up) == 10_000
    assert not simulation.done.keys() & simulation.given_up.keys()
    assert len(simulation.given_up) <= 1, "four deaths over one unit are one in a hundred million"
    # The driver holds what is with the workers, two units ahead for each, and what came back.
    assert simulation.most_held <= (2 + DEPTH) * workers
    ideal = sum(item.cost for item in units) / workers
    assert seconds <= 1.1 * ideal


def test_a_unit_is_given_up_after_its_retries_and_takes_no_other_document_with_it() -> None:
    scheduler = Scheduler([unit("bad", documents=2)], retries=2)
    seen = []
    for place in range(4):
        scheduler.join(f"w{place}")
        worker, ticket = next(iter(scheduler.assign()))
        seen.append(names(ticket.unit))
        given_up = scheduler.leave(worker)
    # Whole, whole again, then one by one.
    assert seen == [["bad.0", "bad.1"], ["bad.0", "bad.1"], ["bad.0"], ["bad.1"]]
    assert given_up is not None
    assert scheduler.finished


def test_only_the_unit_that_was_worked_on_counts_as_lost() -> None:
    scheduler = Scheduler([unit(name) for name in "abcdef"], retries=0)
    scheduler.join("w")
    first, second = [ticket for _, ticket in scheduler.assign()]
    assert scheduler.leave("w") is first.unit
    assert not second.losses
    scheduler.join("v")
    rest = []
    while not scheduler.finished:
        for worker, ticket in list(scheduler.assign()):
            rest += names(ticket.unit)
            scheduler.done(worker, ticket)
    assert sorted(rest) == ["b.0", "c.0", "d.0", "e.0", "f.0"]


def hand_out_one_by_one(scheduler: Scheduler) -> list[Unit]:
    given = []
    while not scheduler.finished:
        worker, ticket = next(iter(scheduler.assign()))
        scheduler.done(worker, ticket)
        given.append(ticket.unit)
    return given


def test_what_was_lost_comes_first_and_at_the_end_what_takes_longest() -> None:
    sizes = {"first": 1, "second": 2, "short": 1, "long": 9, "middle": 5}
    scheduler = Scheduler([unit(name, size) for name, size in sizes.items()], retries=1)
    scheduler.join("w")
    worker, ticket = next(iter(scheduler.assign()))
    assert names(ticket.unit) == ["first.0"]
    scheduler.leave(worker)
    scheduler.join("v")
    scheduler.join("u")
    order = [names(item)[0] for item in hand_out_one_by_one(scheduler)]
    assert order == ["first.0", "second.0", "long.0", "middle.0", "short.0"]


def test_a_worker_stays_with_its_model() -> None:
    scheduler = Scheduler([unit("a", 9, "one"), unit("b", 5, "two"), unit("c", 1, "one")], retries=0)
    scheduler.join("w")
    assert [item.model for item in hand_out_one_by_one(scheduler)] == ["one", "one", "two"]


def test_what_a_worker_could_not_do_is_tried_by_another_one() -> None:
    whole = unit("u", documents=2)
    part = whole.split()[1]
    scheduler = Scheduler([whole], retries=1)
    scheduler.join("w")
    ((worker, ticket),) = scheduler.assign()
    assert scheduler.done(worker, ticket, part) is None
    ((worker, ticket),) = scheduler.assign()
    assert names(ticket.unit) == ["u.1"]
    assert scheduler.done(worker, ticket, part) == part
    assert scheduler.finished


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_to_do(workers: int) -> None:
    scheduler = Scheduler([], retries=3)
    for place in range(workers):
        scheduler.join(f"w{place}")
    assert list(scheduler.assign()) == []
    assert scheduler.finished
