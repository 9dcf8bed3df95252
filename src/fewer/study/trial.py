"""One trial: an arm run with a seed. It is named by plain words, runs anywhere, and tells what it finds as a stream of events."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import msgspec

from fewer.errors import UserError
from fewer.plain import plain_all
from fewer.study.declaration import Scale, Study
from fewer.study.pictures import are_pictures, sheet

Status = Literal["done", "failed", "out of memory", "timed out", "killed", "pruned"]


class TrialSpec(msgspec.Struct, frozen=True):
    """The full name of a trial. Two trials of equal names give equal quality figures on one machine."""

    module: str  # the study's module, whose `study` is run
    slug: str
    arm: str  # "" only prepares the task
    seed: int
    scale: Scale
    settings: dict[str, Any]
    device: str = "cpu"
    threads: int = 1
    tuning: bool = False  # test data sealed, reports answered

    @property
    def key(self) -> bytes:
        """What tells this trial from others in a store."""
        return msgspec.json.encode([self.slug, self.arm, self.seed, self.scale, sorted(self.settings.items()), self.device])


class Event(msgspec.Struct, tag_field="event"):
    """Something a trial says while it runs."""


class FigureEvent(Event, tag="figure"):
    name: str
    value: float | None  # None is NaN, which JSON cannot say
    coordinates: dict[str, Any]


class ProgressEvent(Event, tag="progress"):
    done: float
    total: float
    text: str


class PictureEvent(Event, tag="picture"):
    """A sheet of pictures that the trial made."""

    name: str
    png: bytes


class NoteEvent(Event, tag="note"):
    name: str
    text: str


class ReportEvent(Event, tag="report"):
    """While tuning: the objective so far; the answer says whether to go on."""

    step: int
    value: float | None


class ObjectiveEvent(Event, tag="objective"):
    value: float | None


class FinishedEvent(Event, tag="finished"):
    status: Status
    seconds: float
    peak_memory: int
    error: str = ""
    user_error: bool = False  # the error is one line for the user, who can mend it


AnyEvent = FigureEvent | PictureEvent | ProgressEvent | NoteEvent | ReportEvent | ObjectiveEvent | FinishedEvent
Emit = Callable[[AnyEvent], None]
encode = msgspec.json.Encoder().encode


def decode_event(words: bytes) -> AnyEvent:
    """An event as a worker sent it, its words made plain: a trial's code may be a stranger's."""
    return msgspec.convert(plain_all(msgspec.json.decode(words)), AnyEvent)


decode_spec = msgspec.json.Decoder(TrialSpec).decode


class Pruned(BaseException):
    """Raised inside a trial that the tuner gives up."""


class SealedTestData:
    """Stands where the test data were while settings are tuned: any use of it is an error."""

    def _refuse(self, *_: object, **__: object) -> Any:
        raise RuntimeError(
            "test data are sealed while settings are tuned; leave the arm after trial.objective(...) when trial.tuning is true"
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __call__ = __array__ = _refuse


class Trial:
    """What an arm is given to measure and log with.

    Attributes:
        seed: everything random comes from it (Python, NumPy and torch are seeded with it already).
        scale: `Scale.QUICK` or `Scale.FULL`.
        settings: the study's options and this arm's settings, tuned where they were tuned.
        device: "cpu" or "cuda".
        tuning: true while settings are being chosen; test data are sealed then.
    """

    def __init__(self, spec: TrialSpec, emit: Emit, ask: Callable[[ReportEvent], bool] | None = None) -> None:
        self.seed, self.scale, self.settings, self.device, self.tuning = spec.seed, spec.scale, spec.settings, spec.device, spec.tuning
        self._emit, self._ask = emit, ask

    def log(self, figure: str, value: float, **coordinates: Any) -> None:
        """Log a figure, at coordinates where it is a point of a curve. NaN is kept as NaN."""
        self._emit(FigureEvent(figure, _number(value), coordinates))

    def note(self, name: str, text: str) -> None:
        """Keep a line of words with the trial (where a figure comes from, what was done differently)."""
        self._emit(NoteEvent(name, text))

    def show(self, images: Any, name: str = "samples", *, span: tuple[float, float] = (-1.0, 1.0)) -> None:
        """Keep a sheet of the first 64 images, which the report shows beside those of the same name that other arms made.

        Args:
            images: [N, H, W], [N, 1, H, W] or [N, 3, H, W]; of another shape (latents) nothing is kept.
            name: what they are, in words.
            span: the values of black and of white.
        """
        if are_pictures(tuple(images.shape)) and not self.tuning:
            self._emit(PictureEvent(name, sheet(images, span)))

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Say how far the trial is."""
        self._emit(ProgressEvent(done, total, text))

    def report(self, step: int, value: float) -> None:
        """Say the objective so far (higher is better); while tuning, the trial may end here."""
        if self.tuning and self._ask and not self._ask(ReportEvent(step, _number(value))):
            raise Pruned

    def objective(self, value: float) -> None:
        """Say what the settings are judged by, from validation data; higher is better."""
        self._emit(ObjectiveEvent(_number(value)))

    def follow(self, figure: str, *, total: float = 0, text: str = "", over: str = "epoch", **coordinates: Any) -> Callable[[float], None]:
        """A function to call with a value an epoch (a step, a round): each is logged over its number, and progress is told.

        Args:
            total: how many there will be at most; 0 tells no progress.
            text: what the progress says beside the value.
        """
        numbers = itertools.count(1)

        def tell(value: float) -> None:
            number = next(numbers)
            self.log(figure, value, **{over: number}, **coordinates)
            if total:
                self.progress(number, total, f"{text or figure}: {value:.4g}")

        return tell

    @contextlib.contextmanager
    def tensors(self, figure: str, *tracked: Any, beside: Sequence[str] = (), **coordinates: Any) -> Iterator[Any]:
        """Log the peak of the block's tensors in bytes as `figure`, and its parts: `FIGURE.parameters`, `.gradients`, `.optimizer_state`, ...

        Args:
            tracked: modules and optimizers whose tensors are told apart.
            beside: kinds of `meters.memory_for` that are not counted in the peak.
        """
        from fewer import meters

        with meters.tensor_memory(*tracked, beside=beside) as memory:
            yield memory
        self.log(figure, memory.total, **coordinates)
        for kind, size in (memory.bytes | memory.beside).items():
            self.log(f"{figure}.{kind}", size, **coordinates)

    @contextlib.contextmanager
    def measure(self, name: str, **coordinates: Any) -> Iterator[Any]:
        """Log what the block costs: `NAME.seconds`, `NAME.cpu_seconds`, `NAME.peak_memory` (bytes), `NAME.joules` and every counter fed in it."""
        from fewer import meters

        with meters.measure() as measurement:
            yield measurement
        for figure, value in measurement.figures().items():
            self.log(f"{name}.{figure}", value, **coordinates)
        if measurement.energy_source:
            self.note("energy", measurement.energy_source)


def _number(value: float) -> float | None:
    number = float(value)
    return None if number != number else number


def import_part(module: str) -> ModuleType:
    """A method's module; UserError in one line, with the place, where it is not there or raises."""
    try:
        return importlib.import_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}, line {place.lineno}"
        raise UserError(
            f"{module} cannot be imported: {type(error).__name__}: {error} ({where}); mend it, or install what it needs"
        ) from error


def load_study(module: str) -> Study:
    """The `study` of a module; UserError where the module cannot be imported or has none."""
    study = getattr(import_part(module), "study", None)
    if not isinstance(study, Study):
        raise UserError(f"{module} defines no `study`; expected study = Study(...)")
    return study


def run_trial(spec: TrialSpec, emit: Emit, ask: Callable[[ReportEvent], bool] | None = None) -> None:
    """Run one trial in this process and emit its events, the last of them a FinishedEvent whatever happens."""
    started = time.perf_counter()
    status, error, user_error = "done", "", False
    try:
        study = load_study(spec.module)
        if study.memory_limit:
            resource.setrlimit(resource.RLIMIT_DATA, (study.memory_limit, study.memory_limit))
        _seed_everything(spec)
        task = study.build_task(spec.scale, spec.settings)
        if spec.arm:
            if spec.tuning:
                task = _seal(task)
            _seed_everything(spec)
            study.arms[spec.arm].run(task, Trial(spec, emit, ask))
    except Pruned:
        status = "pruned"
    except UserError as mistake:
        status, error, user_error = "failed", str(mistake), True
    except Exception as failure:
        status = "out of memory" if _is_out_of_memory(failure) else "failed"
        error = "".join(traceback.format_exception(failure))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    emit(FinishedEvent(status, time.perf_counter() - started, peak, error, user_error))


def _seal(task: Any) -> Any:
    """The task without its test data."""
    if not hasattr(task, "test"):
        return task
    if dataclasses.is_dataclass(task) and not isinstance(task, type):
        return dataclasses.replace(task, test=SealedTestData())
    setattr(task, "test", SealedTestData())  # noqa: B010 - any object
    return task


def _is_out_of_memory(failure: BaseException) -> bool:
    return isinstance(failure, MemoryError) or "out of memory" in str(failure).lower() or "can't allocate memory" in str(failure)


def _seed_everything(spec: TrialSpec) -> None:
    """Seed what is random in this process, and let torch use the planned number of threads and repeatable algorithms."""
    import numpy as np

    random.seed(spec.seed)
    np.random.seed(spec.seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(spec.seed)
        torch.set_num_threads(spec.threads)
        make_torch_repeatable()


def make_torch_repeatable() -> None:
    """Let torch use repeatable algorithms, without the nets for debugging that slow them down."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] - torch's stubs lack it
