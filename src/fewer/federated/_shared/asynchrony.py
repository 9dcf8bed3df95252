"""Training without rounds: clients come when they like, make as many local steps as they like, and the server waits for nobody.

Who comes when does not depend on the model, as the server steps at once when a buffer of returns is full. So a `schedule` is computed
beforehand by a pure function of simulated clocks, and `simulate_anarchic` runs any algorithm over it. A version is the number of updates
that made a model: the start is version 0. The delay of a return is the server's version when it is used, minus the version it fetched.
"""

from __future__ import annotations

import hashlib
import heapq
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fewer import meters
from fewer.checks import check_choice, check_not_negative, check_positive, check_whole
from fewer.federated._shared.algorithm import (
    Algorithm,
    Message,
    Reply,
    ServerState,
    Vectors,
    aggregated,
    good_replies,
    run_configure,
)
from fewer.federated._shared.checkpoint import save_checkpoint
from fewer.federated._shared.clients import Shards, pace_rng
from fewer.federated._shared.flat_model import FlatModel, Loss, cross_entropy
from fewer.federated._shared.sampling import FixedSize
from fewer.federated._shared.simulate import History, Round, begin, told, train

LONGEST = 100  # buffers a worker: a schedule that fills one buffer with more visits of each worker is a mistake


@dataclass(frozen=True)
class Return:
    """A worker comes back.

    Attributes:
        worker: its id.
        version: of the model that it fetched.
        steps: how many local steps it made.
        visit: its how manieth visit this is (from 1), which its batches depend on; None: the one after its last.

    Raises:
        ValueError: steps or visit is below 1, worker or version below 0.
    """

    worker: int
    version: int
    steps: int
    visit: int | None = None

    def __post_init__(self) -> None:
        check_whole(least=0, worker=self.worker, version=self.version)
        check_whole(optional=["visit"], steps=self.steps, visit=self.visit)


@dataclass(frozen=True)
class Update:
    """The server steps.

    Attributes:
        time: simulated seconds since the start.
        returns: those that it steps with, in order of arrival.
    """

    time: float
    returns: list[Return]


@dataclass(frozen=True)
class Clock:
    """How long visits take, in simulated seconds: latency + steps * seconds_per_step of the worker.

    Args:
        seconds_per_step: of each worker.
        latency: of fetching and returning together.
        rest: seconds between a worker's return and its next fetch.
        steps: local steps a visit: a tuple (least, most) is drawn from uniformly at each visit, both ends included; a list has a fixed
            number a worker.

    Raises:
        ValueError: a number of seconds is not positive (latency, rest: is negative) or NaN, steps are below 1 or their range is empty.

    Examples:
        >>> Clock([1.0, 2.0, 4.0], latency=0.5, steps=[1, 1, 1]).seconds(2, steps=3)
        12.5
    """

    seconds_per_step: Sequence[float]
    latency: float = 0.5
    rest: float = 0.0
    steps: tuple[int, int] | list[int] = (1, 10)

    def __post_init__(self) -> None:
        check_positive(**{f"seconds_per_step[{worker}]": float(seconds) for worker, seconds in enumerate(self.seconds_per_step)})
        check_not_negative(latency=self.latency, rest=self.rest)
        named: dict[str, Any] = {f"steps[{place}]": steps for place, steps in enumerate(self.steps)}
        check_whole(**named)
        if isinstance(self.steps, tuple) and (len(self.steps) != 2 or self.steps[0] > self.steps[1]):
            raise ValueError(f"steps is {self.steps}; expected a tuple (least, most), or a list of a fixed number a worker")

    def check(self, workers: int) -> None:
        """ValueError where the clock is one of another number of workers."""
        if len(self.seconds_per_step) != workers:
            raise ValueError(f"seconds_per_step has {len(self.seconds_per_step)} numbers for {workers} workers; expected one a worker")
        if isinstance(self.steps, list) and len(self.steps) != workers:
            raise ValueError(f"steps is a list of {len(self.steps)} for {workers} workers; expected one a worker, or a tuple (least, most)")

    def steps_of(self, worker: int, visit: int, seed: int) -> int:
        """How many local steps a worker makes at its n-th visit; the draw depends on seed, worker and visit alone."""
        if isinstance(self.steps, list):
            return self.steps[worker]
        least, most = self.steps
        return int(pace_rng(seed, visit, worker).integers(least, most + 1))

    def seconds(self, worker: int, steps: int) -> float:
        """How long a visit takes."""
        return self.latency + steps * self.seconds_per_step[worker]


FETCH, RETURN = 0, 1


def schedule(clock: Clock, workers: int, buffer: int, updates: int, seed: int = 0) -> list[Update]:
    """Who comes when: all workers fetch version 0 at time 0, and each comes again as soon as it has returned and rested.

    Args:
        clock: how long visits take.
        workers: how many there are.
        buffer: how many returns make an update; the last of them makes it *before* its sender fetches again.
        updates: how many to compute; the first ones of a longer schedule are those of a shorter one.
        seed: of the numbers of local steps.

    Returns:
        the updates in turn. Workers that are ready at the same moment come in the order of their ids.

    Raises:
        ValueError: the buffer is below 1 or over 100 times the workers, or the clock has another number of workers.

    Examples:
        >>> [(update.time, update.returns[0].worker) for update in schedule(Clock([1.0, 3.0], steps=[1, 1]), 2, buffer=1, updates=3)]
        [(1.5, 0), (3.0, 0), (3.5, 1)]
    """
    check_whole(workers=workers, buffer=buffer, updates=updates)
    check_whole(least=0, seed=seed)
    clock.check(workers)
    if buffer > LONGEST * workers:
        raise ValueError(f"buffer is {buffer} for {workers} workers; expected 1 to {LONGEST * workers}: the buffer counts returns")
    done: list[Update] = []
    arrived: list[Return] = []
    visits = [0] * workers
    away: dict[int, Return] = {}
    events = [(0.0, worker, FETCH) for worker in range(workers)]
    while len(done) < updates:
        now, worker, what = heapq.heappop(events)
        if what == FETCH:
            visits[worker] += 1
            steps = clock.steps_of(worker, visits[worker], seed)
            away[worker] = Return(worker, len(done), steps)
            heapq.heappush(events, (now + clock.seconds(worker, steps), worker, RETURN))
            continue
        arrived.append(away.pop(worker))
        if len(arrived) == buffer:
            done.append(Update(now, arrived))
            arrived = []
        heapq.heappush(events, (now + clock.rest, worker, FETCH))
    return done


def synchronous_rounds(clock: Clock, workers: int, chosen: int, updates: int, steps: int, seed: int = 0) -> list[Update]:
    """Rounds under the same clock, as FedAvg makes them: so many workers are drawn, each makes the demanded number of steps, and the round
    lasts as long as its slowest.

    Examples:
        >>> [update.time for update in synchronous_rounds(Clock([1.0, 3.0], latency=0.5), 2, chosen=2, updates=2, steps=5)]
        [15.5, 31.0]
    """
    check_whole(workers=workers, chosen=chosen, updates=updates, steps=steps)
    clock.check(workers)
    if chosen > workers:
        raise ValueError(f"chosen is {chosen} of {workers} workers; expected 1 to {workers} a round")
    done, now, sampler = [], 0.0, FixedSize(chosen / workers)
    for version in range(updates):
        drawn = sampler(range(workers), version + 1, seed)
        now += max(clock.seconds(worker, steps) for worker in drawn)
        done.append(Update(now, [Return(worker, version, steps) for worker in drawn]))
    return done


def check_updates(updates: Sequence[Update], workers: int) -> None:
    """ValueError where a return cannot be: of no worker that there is, or of a version that is not there yet."""
    if not updates:
        raise ValueError("no updates were given; expected a list such as schedule(...) returns")
    for number, update in enumerate(updates, 1):
        if not update.returns:
            raise ValueError(f"update {number} has no returns; expected at least one")
        for each in update.returns:
            if each.worker >= workers:
                raise ValueError(f"update {number} has a return of worker {each.worker}; expected 0 to {workers - 1}: one of the shards")
            if each.version >= number:
                raise ValueError(
                    f"update {number} has a return of worker {each.worker} with version {each.version}; expected 0 to {number - 1}: "
                    "what was there when it was made"
                )


@dataclass(frozen=True)
class UpdateRound(Round):
    """What happened in an update; `round` is the version that it made, `clients` who returned, in order of arrival.

    Attributes:
        time: simulated seconds since the start.
        delays: of each return: how many updates were made since it fetched.
        left_out: workers whose return was not used (NaN, or too late).
    """

    time: float = 0.0
    delays: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()


class Versions:
    """What workers fetched, held as long as an outstanding visit may still need it: by worker and version.

    A worker fetches references to the model's vectors, so a version that several need is held once.
    """

    def __init__(self, updates: Sequence[Update], after: int) -> None:
        """The updates after the first `after` ones are to come."""
        self._uses = Counter((each.worker, each.version) for update in updates[after:] for each in update.returns)
        self._due: dict[int, list[int]] = defaultdict(list)
        for worker, version in self._uses:
            self._due[version].append(worker)
        self.held: dict[tuple[int, int], Message] = {}

    def fetch(self, algorithm: Algorithm, server: ServerState) -> None:
        """Workers that will need it fetch the model as it is now."""
        if workers := sorted(self._due.pop(server.round, [])):
            for message in run_configure(algorithm, server, workers):
                self.held[message.client, server.round] = message

    def message(self, one: Return) -> Message:
        """What a worker was sent."""
        return replace(self.held[one.worker, one.version], steps=one.steps, visit=one.visit)

    def release(self, one: Return) -> None:
        """A visit is over."""
        key = one.worker, one.version
        self._uses[key] -= 1
        if not self._uses[key]:
            del self.held[key]

    def tensors(self) -> Vectors:
        """What is held, for a checkpoint."""
        return {
            f"held {worker} {version} {name}": vector
            for (worker, version), message in self.held.items()
            for name, vector in message.vectors.items()
        }

    def restore(self, tensors: Vectors) -> None:
        """Hold what a checkpoint held."""
        for name, vector in tensors.items():
            if name.startswith("held "):
                _, worker, version, what = name.split(" ", 3)
                key = int(worker), int(version)
                held = self.held.setdefault(key, Message(key[0], key[1] + 1, {}))
                held.vectors[what] = vector


def simulate_anarchic(
    algorithm: Algorithm,
    model_fn: Callable[[], nn.Module] | FlatModel,
    shards: Shards,
    updates: Sequence[Update],
    *,
    seed: int = 0,
    executor: Literal["vmap"] | None = None,
    loss_fn: Loss = cross_entropy,
    buffers: Literal["average"] | None = None,
    evaluate: Callable[[Tensor], Any] | None = None,
    checkpoint: Path | None = None,
    tell: Callable[[UpdateRound], None] | None = None,
) -> History:
    """Run a federated algorithm over a schedule, in this process.

    A return that is not finite, or older than the algorithm's `max_delay` where it has one, is left out with a warning that names the
    worker. As the schedule is fixed beforehand, the update is made with the others (Flower's server waits for another return); where none
    is left the model stays as it is.

    Args:
        algorithm: its three functions, such as `AnarchicAlgorithm(config)`. Each message says how many steps the worker makes.
        model_fn: makes the model whose parameters are the start (or a `FlatModel`).
        shards: the examples and who holds which.
        updates: from `schedule`, or written by hand.
        seed: of every worker's batches, which depend on it, the worker and its visit alone.
        executor: None trains the workers of an update one after the other; "vmap" all at once, equal within rounding.
        loss_fn: the losses of the examples [B] (see `FlatModel`).
        buffers: "average" for models with BatchNorm.
        evaluate: called with the global parameters [d] after each update.
        checkpoint: a file that the state is written into after each update, with the versions that are still needed, and taken up from
            where it exists.
        tell: called with each `UpdateRound` when it is done.

    Returns:
        the run; its rounds are `UpdateRound`s.

    Raises:
        ValueError: a return is of no worker that there is or has a version that is not there yet, the executor is none, the model has
            statistics and `buffers` is unset, or the checkpoint is of other updates, workers, seed or algorithm.
        OSError: the checkpoint cannot be written where it is asked for.

    Examples:
        >>> import torch
        >>> from fewer.federated import AnarchicAlgorithm, AnarchicConfig
        >>> shards = Shards(torch.randn(40, 3), torch.arange(40) % 2, torch.arange(40).split(10))
        >>> updates = schedule(Clock([1.0, 1.0, 2.0, 5.0], steps=(1, 4)), workers=4, buffer=2, updates=3)
        >>> history = simulate_anarchic(AnarchicAlgorithm(AnarchicConfig(variant="cs")), lambda: nn.Linear(3, 2), shards, updates)
        >>> [each.round for each in history.rounds], max(history.rounds[2].delays) <= 2
        ([1, 2, 3], True)
    """
    check_whole(least=0, seed=seed)
    check_choice([None, "vmap"], executor=executor)
    updates = list(numbered(updates))
    check_updates(updates, len(shards))
    about = {"seed": seed, "algorithm": repr(algorithm), "updates": digest(updates)}
    history, kept = begin(algorithm, model_fn, shards, loss_fn, buffers, checkpoint, about)
    versions = Versions(updates, history.server.round)
    versions.restore(kept)
    for number in range(history.server.round + 1, len(updates) + 1):
        update, started, used = updates[number - 1], time.perf_counter(), time.process_time()
        versions.fetch(algorithm, history.server)
        messages = [versions.message(each) for each in update.returns]
        replies: dict[int, Reply] = {}
        with meters.counting() as counts:
            for places in apart(messages) if algorithm.keeps else [range(len(messages))]:
                some = [messages[place] for place in places]
                answers = train(algorithm, some, shards, history.flat, history.client_states, seed, executor)
                replies.update(zip(places, answers, strict=True))
        arrived = [replies[place] for place in range(len(messages))]
        delays = [number - 1 - each.version for each in update.returns]
        good = good_replies(algorithm, history.server, in_time(algorithm, arrived, delays))
        if good:
            history.server = aggregated(algorithm, history.server, good)
        else:
            warnings.warn(f"update {number}: no good return of {len(arrived)}; the model stays as it is", stacklevel=2)
            history.server = replace(history.server, round=number)
        for each in update.returns:
            versions.release(each)
        line = told(number, messages, arrived, counts, started, used)
        left_out = tuple(reply.client for reply in arrived if not any(reply is each for each in good))
        done = UpdateRound(**{**vars(line), "time": update.time, "delays": tuple(delays), "left_out": left_out})
        if evaluate is not None:
            done = replace(done, evaluation=evaluate(history.server.x))
        history.rounds.append(done)
        if checkpoint is not None:
            save_checkpoint(checkpoint, history.server, history.client_states.tables | versions.tensors(), **about)
        if tell is not None:
            tell(done)
    return history


def numbered(updates: Sequence[Update]) -> Iterator[Update]:
    """The same updates, each return with the number of its worker's visit."""
    visits: Counter[int] = Counter()
    for update in updates:
        returns = []
        for each in update.returns:
            visits[each.worker] = each.visit if each.visit is not None else visits[each.worker] + 1
            returns.append(replace(each, visit=visits[each.worker]))
        yield Update(update.time, returns)


def digest(updates: Sequence[Update]) -> str:
    """A name for a list of updates, by which a checkpoint knows its own."""
    words = "\n".join(
        f"{update.time!r} {[(each.worker, each.version, each.steps, each.visit) for each in update.returns]}" for update in updates
    )
    return f"{len(updates)}, {hashlib.sha256(words.encode()).hexdigest()[:12]}"


def apart(messages: Sequence[Message]) -> list[list[int]]:
    """The places of messages in groups that hold no client twice, earlier visits first: what a client keeps from one visit is what it
    starts the next with."""
    groups: list[list[int]] = []
    seen: Counter[int] = Counter()
    for place, message in enumerate(messages):
        if seen[message.client] == len(groups):
            groups.append([])
        groups[seen[message.client]].append(place)
        seen[message.client] += 1
    return groups


def in_time(algorithm: Algorithm, replies: Sequence[Reply], delays: Sequence[int]) -> list[Reply]:
    """The replies that are not too old; of each other one a warning tells the worker and its delay."""
    good = []
    for reply, delay in zip(replies, delays, strict=True):
        if fault := lateness(algorithm, delay):
            warnings.warn(f"client {reply.client} {fault}; its reply is left out", stacklevel=3)
        else:
            good.append(reply)
    return good


def lateness(algorithm: Algorithm, delay: int) -> str:
    """What is wrong with a reply of this delay, in words; empty where nothing is. An algorithm may have a `max_delay`."""
    most = getattr(algorithm, "max_delay", None)
    return f"came with a delay of {delay} updates; expected at most {most} (max_delay)" if most is not None and delay > most else ""
