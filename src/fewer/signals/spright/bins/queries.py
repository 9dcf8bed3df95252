"""Asking f: in batches, each point once, every answer checked, and what was asked counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64, Int64

from fewer.meters import count
from fewer.signals.spright.bins.bits import Bits, Words, enter, pack, unpack
from fewer.signals.spright.transform import check_power_of_two

Function = Callable[[Any], Any]
LONG = 1.0  # seconds after which a terminal is shown how far the queries are


class Executor(Protocol):
    """What asks batches elsewhere, in any order, and gives the answers in order: concurrent.futures, multiprocessing's pools, Ray's."""

    def map(self, function: Function, batches: Any, /) -> Any: ...


class QueryLog:
    """All that was asked of f, and the answers.

    Args:
        f: takes bit vectors [q, n] uint8 and gives q real numbers.
        n: variables.
        batch_size: rows of a call.
        executor: where the calls are made; None makes them here, one after the other.
        progress: show a bar on a terminal when it lasts more than a second.

    Attributes:
        queries: points asked so far, each once.
    """

    def __init__(self, f: Function, n: int, batch_size: int, executor: Executor | None, progress: bool) -> None:
        self.f, self.n, self.batch_size, self.executor, self.progress = f, n, batch_size, executor, progress
        self.queries = 0
        self._table = np.full(1024, -1, dtype=np.int32)
        self._keys: Words = np.empty((512, max(1, -(-n // 64))), dtype=np.uint64)
        self._values: Float64[np.ndarray, "points"] = np.empty(0)
        self._known = 0

    def number(self, points: Words) -> Int64[np.ndarray, "points"]:
        """The place of each point among all that are known; new ones are known from now on, though not yet asked."""
        room = 1 << (self._known + len(points)).bit_length()
        if room > len(self._keys):
            keys = np.empty((room, self._keys.shape[1]), dtype=np.uint64)
            table = np.full(2 * room, -1, dtype=np.int32)
            if self._known:
                enter(table, keys, 0, self._keys[: self._known], np.empty(self._known, dtype=np.int64))
            self._keys, self._table = keys, table
        numbers = np.empty(len(points), dtype=np.int64)
        self._known = enter(self._table, self._keys, self._known, points, numbers)
        return numbers

    @property
    def unasked(self) -> int:
        """Points that are known and not asked."""
        return self._known - self.queries

    def answers(self, numbers: Int64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        """f at the points of these places; asks what was not asked.

        Raises:
            ValueError: answers of a wrong length, complex, NaN or infinite.
            Exception: f's own, with a note of how many queries were spent.
        """
        if self.unasked:
            self._values = np.concatenate([self._values, *self._ask(self._keys[self.queries : self._known])])
        return self._values[numbers]

    def _ask(self, points: Words) -> Iterator[Float64[np.ndarray, "batch"]]:
        batches = (unpack(points[start : start + self.batch_size], self.n) for start in range(0, len(points), self.batch_size))
        sizes = [min(self.batch_size, len(points) - start) for start in range(0, len(points), self.batch_size)]
        answered = iter(self._calls(batches))
        bar = Bar(len(points), shown=self.progress)
        with bar:
            for size in sizes:
                try:
                    answer = next(answered)
                except Exception as error:
                    error.add_note(f"{self.queries} queries had been answered before the batch of {size} in which f raised this")
                    raise
                checked = check_answer(answer, size, self.queries)
                self.queries += size
                count("queries", size)
                bar.advance(size)
                yield checked

    def _calls(self, batches: Iterator[Bits]) -> Any:
        return map(self.f, batches) if self.executor is None else self.executor.map(self.f, batches)


def check_answer(answer: Any, size: int, before: int) -> Float64[np.ndarray, "batch"]:
    """f's answer to a batch as float64 [size]; ValueError, naming the row, where it is none."""
    values = np.asarray(answer)
    if values.shape != (size,):
        raise ValueError(f"f gave shape {values.shape} for {size} rows; expected ({size},): one number a row")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"f gave {values.dtype}; expected real numbers: transform real and imaginary part apart")
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(finite.argmin())
        raise ValueError(
            f"f gave {values[row]} in row {row} of a batch of {size} (query {before + row}); expected finite numbers: mend f there"
        )
    return values


class Bar:
    """A progress bar on a terminal, once the queries last longer than a second."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown, self._done = total, shown and sys.stderr.isatty(), 0
        self._began, self._bars, self._task = time.monotonic(), None, None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, queries: int) -> None:
        self._done += queries
        if not self._shown:
            return
        if self._bars is None and time.monotonic() - self._began > LONG:
            from rich.console import Console
            from rich.progress import Progress

            self._bars = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bars.add_task("queries", total=self._total)
            self._bars.start()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done)


class ArrayFunction:
    """An array of length 2^n as a function of bit vectors: its index is the vector read as a binary number, first bit first.

    Args:
        array: one-dimensional, real, of length 2^n; it may lie in a file that is mapped (`numpy.load(..., mmap_mode="r")`).

    Raises:
        ValueError: another shape, or a length that is no power of two.

    Examples:
        >>> f = ArrayFunction(np.array([10.0, 11.0, 12.0, 13.0]))
        >>> f.n, f(np.array([[1, 0]], dtype=np.uint8))
        (2, array([12.]))
    """

    def __init__(self, array: np.ndarray) -> None:
        if array.ndim != 1 or array.dtype.kind not in "fiub":
            raise ValueError(f"the array is {array.dtype} of shape {array.shape}; expected real numbers of shape (2^n,): flatten it")
        check_power_of_two("the array", len(array))
        self.array, self.n = array, len(array).bit_length() - 1

    def __call__(self, m: Bits) -> np.ndarray:
        index = (pack(m)[:, 0] >> np.uint64(64 - self.n)).astype(np.int64) if self.n else np.zeros(len(m), dtype=np.int64)
        return self.array[index]
