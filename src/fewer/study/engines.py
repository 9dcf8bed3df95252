"""Where trials run: in fresh processes of this machine, or on a Ray cluster. Both speak plain words: a trial's name goes out, JSON events come back."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from queue import SimpleQueue
from typing import Any, Protocol

from fewer.devices import keep_ray_local
from fewer.errors import require
from fewer.plain import plain
from fewer.study.scratch import scratch_folder
from fewer.study.trial import AnyEvent, FinishedEvent, ReportEvent, TrialSpec, decode_event, decode_spec, encode, run_trial

KEEP_OUTPUT = 4000  # characters of a crashed trial's own output that are shown
Answer = Callable[[TrialSpec, ReportEvent], bool]
Events = Generator[tuple[TrialSpec, AnyEvent], None, None]


class Engine(Protocol):
    """Runs trials and yields their events as they come; each trial's last is a FinishedEvent."""

    def run(self, specs: Sequence[TrialSpec], *, time_limit: float, answer: Answer | None = None) -> Events: ...


class LocalEngine:
    """Each trial in its own fresh process, `jobs` at a time.

    Processes are forked from a server that has imported the study's module once (spawned where fork is not to be had, or where CUDA is
    used), so a trial starts with clean memory and does not pay for importing torch again.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs

    def run(self, specs: Sequence[TrialSpec], *, time_limit: float, answer: Answer | None = None) -> Events:
        waiting, running = deque(specs), []
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    running.append(_Process(waiting.popleft(), time_limit))
                wait(
                    [process.connection for process in running],
                    timeout=max(0.0, min(process.deadline for process in running) - time.monotonic()),
                )
                for process in list(running):
                    for event in process.events():
                        if isinstance(event, ReportEvent):
                            process.connection.send_bytes(b"go" if answer is None or answer(process.spec, event) else b"prune")
                        else:
                            yield process.spec, event
                    if process.finished:
                        running.remove(process)
        finally:
            for process in running:
                process.stop()


class InThisProcess:
    """Each trial in this process, one after the other: for what runs within a trial already. A time limit is not kept."""

    def run(self, specs: Sequence[TrialSpec], *, time_limit: float, answer: Answer | None = None) -> Events:
        for spec in specs:
            events: list[AnyEvent] = []
            run_trial(spec, events.append)
            yield from ((spec, event) for event in events)


class _Process:
    """A worker process and the parent's end of its pipe."""

    def __init__(self, spec: TrialSpec, time_limit: float) -> None:
        self.spec, self.finished = spec, False
        self.started = time.monotonic()
        self.deadline = self.started + time_limit
        scratch = scratch_folder()
        context = _context(spec)
        self.output = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - it has no name, and lives as long as the process
        self.connection, theirs = context.Pipe()
        words = (theirs, encode(spec), _Descriptor(self.output.fileno()), str(scratch))
        self.process = context.Process(target=_work, args=words, daemon=True)  # type: ignore[attr-defined]
        with _interrupts_held():
            self.process.start()
        theirs.close()

    def events(self) -> Iterator[AnyEvent]:
        """What has come since the last look; after the process's end or its time limit, the FinishedEvent that says so."""
        try:
            while not self.finished and self.connection.poll():
                event = decode_event(self.connection.recv_bytes())
                self.finished = isinstance(event, FinishedEvent)
                yield event
        except (EOFError, ConnectionResetError):
            self.process.join()
            yield self._ended("killed", self._how_it_died())
        if not self.finished and time.monotonic() >= self.deadline:
            limit = self.deadline - self.started
            yield self._ended("timed out", f"stopped after its time limit of {limit:g} s")
        if self.finished:
            self.stop()

    def _ended(self, status: Any, error: str) -> FinishedEvent:
        self.process.kill()
        self.finished = True
        return FinishedEvent(status, time.monotonic() - self.started, 0, error)

    def _how_it_died(self) -> str:
        code = self.process.exitcode or 0
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        hint = " (often the system's answer to too little memory)" if code == -signal.SIGKILL else ""
        self.output.seek(0)
        said = plain(self.output.read().decode(errors="replace"))[-KEEP_OUTPUT:].strip()
        return f"the trial's process ended by {why}{hint}" + (f"; its last words:\n{said}" if said else "")

    def stop(self) -> None:
        if self.process.is_alive():
            if not self.finished:
                self.process.kill()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
        self.connection.close()
        self.output.close()


class _Descriptor:
    """An open file that goes to a new process: there it arrives as the number of its descriptor."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _arrived, (reduction.DupFd(self.number),)


def _arrived(descriptor: Any) -> int:
    return descriptor.detach()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block ends, so that no process is left half started, and never reach one that is started in it:
    the parent alone decides."""
    _start_tracker()  # which would let Ctrl-C through again if it were started within
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Start what clears up after killed workers, without its words on standard error about having done so."""
    before = list(sys.warnoptions)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # handed on to the process that it is
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions[:] = before


def _context(spec: TrialSpec) -> BaseContext:
    """forkserver with the study preloaded, or spawn where that cannot be."""
    if spec.device.startswith("cuda") or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([spec.module, "fewer.study.ready"])
    return context


def _work(connection: Connection, words: bytes, output: int, scratch: str) -> None:
    """The worker's main: run the trial, send its events, keep its own prints out of the terminal, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # held while this process was started
    _die_with_parent()
    os.environ["TMPDIR"] = tempfile.tempdir = scratch  # what a killed trial leaves is swept with it
    for stream in (1, 2):
        os.dup2(output, stream)
    answers: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                answers.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    lock = threading.Lock()

    def emit(event: AnyEvent) -> None:
        with lock:
            connection.send_bytes(encode(event))

    def ask(event: ReportEvent) -> bool:
        emit(event)  # type: ignore[arg-type]
        return answers.get() == b"go"

    run_trial(decode_spec(words), emit, ask)
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and libraries' exit handlers can hang


def _die_with_parent() -> None:
    """On Linux, ask to be killed with the process that forked us; elsewhere the closed pipe tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class RayEngine:
    """Each trial in a fresh worker process of a Ray cluster (a local one is started where no address is given)."""

    def __init__(self, address: str | None = None, jobs: int | None = None) -> None:
        if address is None:
            keep_ray_local()
        ray = require("ray", "ray")
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self.ray, self.jobs = ray, jobs

    def run(self, specs: Sequence[TrialSpec], *, time_limit: float, answer: Answer | None = None) -> Events:
        ray = self.ray
        jobs = self.jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
        remote = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(_stream)
        waiting, running = deque(specs), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                spec = waiting.popleft()
                running[remote.options(num_returns="streaming").remote(encode(spec))] = (spec, time.monotonic())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for stream in list(running):
                spec, started = running[stream]
                event = self._next(stream, started, time_limit) if stream in ready or time.monotonic() - started > time_limit else None
                if event is None:
                    continue
                yield spec, event
                if isinstance(event, FinishedEvent):
                    del running[stream]

    def _next(self, stream: Any, started: float, time_limit: float) -> AnyEvent:
        """The next event of a stream; a lost worker or a passed time limit is told as a FinishedEvent."""
        seconds = time.monotonic() - started
        if seconds > time_limit:
            self.ray.cancel(stream, force=True)
            return FinishedEvent("timed out", seconds, 0, f"stopped after its time limit of {time_limit:g} s")
        try:
            return decode_event(self.ray.get(next(stream)))
        except (self.ray.exceptions.RayError, StopIteration) as error:
            return FinishedEvent("killed", seconds, 0, f"the trial's worker was lost: {error}")


def _stream(words: bytes) -> Iterator[bytes]:
    """A trial's events as a generator: the trial runs in a thread, its events pass through a queue."""
    events: SimpleQueue[AnyEvent] = SimpleQueue()
    threading.Thread(target=run_trial, args=(decode_spec(words), events.put), daemon=True).start()
    while True:
        event = events.get()
        yield encode(event)
        if isinstance(event, FinishedEvent):
            return
