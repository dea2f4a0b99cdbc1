"""Units on a Ray cluster: one actor per worker, which holds one model at a time.

The driver hands out units, starts a worker anew where one has died, and alone writes the run folder. See
``docs/ray.md``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench.engine.engine import Failure, Measurement
from bench.errors import UserError
from bench.methods.grid import Cell
from bench.progress import LOG_INTERVAL_S
from bench.records.states import StatesMap
from bench.runs.executors.base import Answered, Executor, Setup, Unit, Watch
from bench.runs.executors.cluster import capacity, join_cluster, ray_library, start_cluster, temporary_folder
from bench.runs.executors.scheduler import Scheduler, Ticket
from bench.runs.executors.worker import VERSIONS, Introduction, Worker, versions
from bench.settings.run import RunConfig
from tasks.base import Document

START_S = 120.0
"""How long a run waits for all of its workers before it begins with those that are there."""
PATIENCE_S = 600.0
"""How long it waits where there is none at all."""
WAIT_S = 1.0
"""How long the driver sleeps at most between two looks at its workers."""
DEATHS = 20
"""So many workers may die in a row without any answer in between."""

_OUT_OF_MEMORY = "MemoryError"
"""What errors say of a GPU (OutOfMemoryError), or of the machine, that has no more."""
_BROKEN = ("AcceleratorError", "CUDA error")
"""What errors say after which a process cannot use its GPU any more."""
_PASSED_ON = ("ARKV_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that workers get from the driver."""


@dataclass
class _Hand:
    """A worker as the driver knows it."""

    name: str
    actor: Any
    introduction: Introduction | None = None
    joined: float = 0.0
    documents: int = 0
    failures: int = 0
    ended: str | None = None

    @property
    def place(self) -> str:
        """For a person."""
        return self.name if self.introduction is None else f"{self.name} on {self.introduction.node}"


@dataclass
class _Hands:
    """Workers that are starting, and those that are at work."""

    starting: dict[Any, _Hand] = field(default_factory=dict)
    """By the reference of what they have been asked."""
    working: dict[str, _Hand] = field(default_factory=dict)
    asked: dict[Any, tuple[_Hand, Ticket]] = field(default_factory=dict)
    """Units by the reference of their answers."""


class RayExecutor(Executor):
    """Units on the workers of a cluster.

    Args:
        config: which cluster, and what a worker gets of it.
        setup: what a worker needs to answer.
        fingerprints: identities of the models, by name; workers must find the same ones.
        console: where it says that a worker has died.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, config: RunConfig, setup: Setup, fingerprints: Mapping[str, str], console: Console) -> None:
        self._ray = ray_library()
        self._config = config
        self._setup = setup
        self._fingerprints = dict(fingerprints)
        self._console = console
        self._versions = versions()
        self._hands = _Hands()
        self._known: list[_Hand] = []
        self._deaths_in_a_row = 0
        self._loaded: dict[str, dict[str, str]] = {}
        self._temporary: str | None = None
        self._scheduler: Scheduler | None = None
        self.wanted = 0
        """Workers that the run should have."""

    # --- Begin and end ---

    def __enter__(self) -> RayExecutor:
        try:
            self._connect()
            self._hire()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Workers end with the driver's connection; a cluster of the run's own ends too."""
        self._ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _connect(self) -> None:
        """Raises :class:`UserError` where nobody answers."""
        if self._config.address == "local":
            self._temporary = temporary_folder()
            start_cluster(self._ray, self._temporary)
        else:
            join_cluster(self._ray, self._config.address)

    def _hire(self) -> None:
        """Start the workers and wait for them. Raises :class:`UserError`."""
        config, nodes = self._config, self._ray.nodes()
        have = {kind: sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"]) for kind in ("CPU", "GPU")}
        self._gpus = (1.0 if have["GPU"] else 0.0) if config.gpus_per_worker is None else config.gpus_per_worker
        room = capacity(nodes, config.cpus_per_worker, self._gpus)
        self.wanted = config.workers or room
        if room < self.wanted or not room:
            asked = f"--workers={self.wanted}" if self.wanted else "--executor=ray"
            raise UserError(
                f"{asked}: with {config.cpus_per_worker} CPUs and {self._gpus:g} GPUs each, the cluster has room for "
                f"{room} workers: {sum(node['Alive'] for node in nodes)} nodes, {have['CPU']:g} CPUs, "
                f"{have['GPU']:g} GPUs"
            )
        if not self._gpus and self._setup.device == "auto":
            # It may see the GPUs of its machine, which are not its own.
            self._setup = dataclasses.replace(self._setup, device="cpu")
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._remote = self._ray.remote(Worker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {**kept, "OMP_NUM_THREADS": str(config.cpus_per_worker)}},
        )
        for _ in range(self.wanted):
            self._start()
        begin = time.monotonic()
        while self._hands.starting:
            # One that is there may be fetching its model.
            fetching = any(hand.introduction is not None for hand in self._hands.starting.values())
            patience = START_S if self._hands.working else math.inf if fetching else PATIENCE_S
            if time.monotonic() - begin > patience:
                break
            for ref in self._ready(list(self._hands.starting)):
                if problem := self._step(ref):
                    raise UserError(problem)
        self._need_workers(f"none of {self.wanted} workers could be started")
        if self._hands.starting:
            self._say(f"{len(self._hands.working)} of {self.wanted} workers are there; the others may join later")

    def _start(self) -> None:
        name = f"worker {len(self._known) + 1}"
        hand = _Hand(name, self._remote.remote(self._config.cpus_per_worker))
        self._known.append(hand)
        self._hands.starting[hand.actor.introduce.remote()] = hand

    def _step(self, ref: Any) -> str | None:
        """A starting worker has answered. Returns why it cannot be used, or None."""
        hand = self._hands.starting.pop(ref)
        try:
            said = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            return self._dismiss(hand, f"{hand.place} could not be started: {error.cause}")
        except self._ray.exceptions.RayError as error:
            problem = self._dismiss(hand, f"{hand.place} could not be started: {_last_line(error)}")
            self._deaths_in_a_row += 1
            # What a worker raises while it is made, such as for a package that it lacks, it would raise again.
            if "creation task" in str(error) or self._deaths_in_a_row >= DEATHS:
                return problem
            self._say(problem)
            self._start()
            return None
        if isinstance(said, Introduction):
            hand.introduction = said
            if different := [name for name in VERSIONS if said.versions[name] != self._versions[name]]:
                theirs, mine = (_named(has, different) for has in (said.versions, self._versions))
                return self._dismiss(hand, f"{hand.place} has {theirs}; this process has {mine}: install the same")
            self._hands.starting[hand.actor.prepare.remote(self._setup, self._fingerprints)] = hand
            return None
        if said is not None:
            return self._dismiss(hand, f"{hand.place} cannot use the model: {said}")
        hand.joined = time.monotonic()
        self._hands.working[hand.name] = hand
        if self._scheduler is not None:
            self._scheduler.join(hand.name)
        return None

    def _dismiss(self, hand: _Hand, problem: str) -> str:
        hand.ended = problem
        self._ray.kill(hand.actor)
        return problem

    def _need_workers(self, problem: str) -> None:
        if not self._hands.working:
            raise UserError(f"{problem}; the same command with the same --outdir continues")

    def _say(self, text: str) -> None:
        self._console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False, soft_wrap=True)

    def _ready(self, refs: list[Any]) -> list[Any]:
        found: list[Any] = self._ray.wait(refs, num_returns=1, timeout=WAIT_S)[0]
        return found

    # --- Work ---

    def run(self, units: Iterable[Unit], watch: Watch) -> Iterator[Answered]:
        """See :meth:`Executor.run`; what a worker does with a unit is not known before its answers come.

        Raises:
            UserError: no worker is left, and none came for :data:`PATIENCE_S`.
        """
        scheduler = self._scheduler = Scheduler(units, self._config.retries)
        for name in self._hands.working:
            scheduler.join(name)
        hands = self._hands
        alone_since: float | None = None
        heard = time.monotonic()
        while True:
            for name, ticket in scheduler.assign():
                hand = hands.working[name]
                hands.asked[hand.actor.answer.remote(ticket.unit)] = (hand, ticket)
            if scheduler.finished:
                return
            if hands.working:
                alone_since = None
            else:
                alone_since = alone_since or time.monotonic()
                if not hands.starting or time.monotonic() - alone_since > PATIENCE_S:
                    self._need_workers("no worker is left")
            ready = self._ready([*hands.asked, *hands.starting])
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > LOG_INTERVAL_S and not self._console.is_terminal:
                heard = time.monotonic()
                self._say(f"{self.status()}; no answer for {LOG_INTERVAL_S:.0f} seconds")
            for ref in ready:
                if ref in hands.asked:
                    yield from self._take(ref)
                elif problem := self._step(ref):
                    self._say(problem)

    def _take(self, ref: Any) -> Iterator[Answered]:
        """The answers of a unit, or what becomes of it when its worker is gone."""
        assert self._scheduler is not None
        hand, ticket = self._hands.asked.pop(ref)
        try:
            answers, loaded = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, UserError):
                raise
            yield from self._lose(hand, f"cannot go on: {error.cause}", replace=False)
            return
        except self._ray.exceptions.RayError as error:
            yield from self._lose(hand, f"died: {_last_line(error)}", replace=True)
            return
        self._deaths_in_a_row = 0
        self._loaded |= loaded
        documents = {document.id: document for document, _ in ticket.unit.work}
        broken = [(name, item) for name, item in answers if isinstance(item, Failure) and _says(item, *_BROKEN)]
        again = [(name, item) for name, item in answers if isinstance(item, Failure) and _says(item, _OUT_OF_MEMORY)]
        again += [item for item in broken if item not in again]
        if ticket.losses >= self._config.retries:
            again = []
        hand.documents += len(documents)
        for name, result in answers:
            if (name, result) not in again:
                hand.failures += isinstance(result, Failure)
                yield Answered(ticket.unit, documents[name], result)
        self._scheduler.done(hand.name, ticket, _only(ticket.unit, again) if again else None)
        if broken:
            yield from self._lose(hand, f"cannot use its GPU any more: {broken[0][1].error}", replace=True)

    def _lose(self, hand: _Hand, reason: str, *, replace: bool) -> Iterator[Answered]:
        """A worker is gone: what it had is done elsewhere, or has failed."""
        assert self._scheduler is not None
        hands = self._hands
        hands.working.pop(hand.name)
        hands.asked = {ref: item for ref, item in hands.asked.items() if item[0] is not hand}
        # Unreachable is not dead: it must not go on beside the worker that takes its place.
        self._ray.kill(hand.actor)
        hand.ended = reason
        given_up = self._scheduler.leave(hand.name)
        self._say(f"{hand.place} {reason}" + ("; its documents are done by others" if given_up is None else ""))
        self._deaths_in_a_row += 1
        if given_up is not None:
            hand.failures += len(given_up.work)
            yield from given_up.failures(f"{self._config.retries + 1} workers were lost over it, the last one {reason}")
        if self._deaths_in_a_row >= DEATHS:
            raise UserError(f"{DEATHS} workers in a row were lost, the last one {reason}")
        if replace:
            self._start()
        elif not hands.working and not hands.starting:
            raise UserError(f"no worker is left; the last one, {hand.place}, {reason}")

    # --- What is said about it ---

    def status(self) -> str:
        """Workers that are there, and how fast each is."""
        now = time.monotonic()
        rates = sorted(hand.documents / (now - hand.joined) for hand in self._hands.working.values() if hand.documents)
        text = f"{len(self._hands.working)} of {self.wanted} workers"
        if not rates:
            return text
        ends = [_rate(rates[0]), _rate(rates[-1])]
        return f"{text}, {' to '.join(dict.fromkeys(ends))} documents/min each"

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        """By the worker that has the least to do."""
        tasks = Counter(hand.name for hand, _ in self._hands.asked.values())
        for hand in sorted(self._hands.working.values(), key=lambda hand: tasks[hand.name]):
            try:
                maps: dict[str, StatesMap] = self._ray.get(hand.actor.map_states.remote(name, document, list(cells)))
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, UserError):
                    raise
                raise UserError(f"{hand.place}: {error.cause}") from None
            except self._ray.exceptions.RayError:
                # It is gone, which the run will hear of where its answers are awaited.
                continue
            return maps
        raise UserError(f"no worker is left to map the states of {document.id}")

    def loaded(self) -> dict[str, dict[str, str]]:
        return self._loaded

    def record(self) -> dict[str, Any]:
        """Every worker that took part."""
        workers = []
        for hand in self._known:
            if hand.introduction is not None:
                facts = {"node": hand.introduction.node, "hardware": hand.introduction.hardware, "ended": hand.ended}
                workers.append({"name": hand.name, "documents": hand.documents, "failures": hand.failures, **facts})
        return {"name": "ray", "retries": self._config.retries, "workers": workers}


def _named(found: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in names)


def _rate(per_second: float) -> str:
    return f"{60 * per_second:.3g}"


def _says(failure: Failure, *words: str) -> bool:
    return any(word in failure.error for word in words)


def _only(unit: Unit, failed: Iterable[tuple[str, Measurement | Failure]]) -> Unit:
    """Of a unit, the documents and cells of ``failed``."""
    keys = {(name, result.cell.key) for name, result in failed}
    work = [(doc, tuple(cell for cell in cells if (doc.id, cell.key) in keys)) for doc, cells in unit.work]
    return dataclasses.replace(unit, work=tuple(item for item in work if item[1]))


def _last_line(error: BaseException) -> str:
    """Of what Ray says about a death, the part that says why."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
