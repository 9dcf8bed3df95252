"""Where blocks live while they are not computed with: on the device, in host memory or in a directory, in their own type or a shorter one.

A block is one flat bucket of bytes, each parameter at a multiple of 64, so that kernels see the alignment that they see in a model of
its own. A walk attaches one after the other; the next is on its way in and the last on its way out meanwhile: at most three.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fewer.files import whole_file
from fewer.language.zo2.blocks import owner_of

ALIGNMENT = 64  # bytes
SCALE = 8  # bytes at the end of a short bucket: its scale, float64
CHUNK = 1 << 17  # numbers that are rounded at a time: what comes between stays in the cache, and out of the memory that is to be saved


def check_space(folder: Path, size: int) -> None:
    """ValueError where a directory's place has no room for twice so many bytes: two generations."""
    free = shutil.disk_usage(next(each for each in folder.absolute().parents if each.exists())).free
    if 2 * size > free:
        raise ValueError(
            f"store_dir {folder} has {free / 1e9:.3g} GB free; expected {2 * size / 1e9:.3g} GB, twice the model: choose another place"
        )


def buffer(size: int) -> UInt8[Tensor, "size"]:
    """Bytes of zero that go back to the system when they are let go of; the allocator of small things would keep them for itself."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def release() -> None:
    """Give freed memory back to the system: glibc keeps what is freed between blocks, and soon holds more of it than of blocks."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Slot(NamedTuple):
    """Where a parameter lies in its block's bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes
    trained: bool

    def view(self, bucket: UInt8[Tensor, "bytes"]) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return bucket[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class Layout:
    """The slots of a block.

    Attributes:
        size: bytes of a bucket.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.slots: list[Slot] = []
        self.size = 0
        for name, parameter in parameters.items():
            self.slots.append(Slot(name, tuple(parameter.shape), parameter.dtype, self.size, parameter.requires_grad))
            self.size += -(-parameter.numel() * parameter.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def pack(self, value_of: Callable[[str], Tensor]) -> UInt8[Tensor, "bytes"]:
        """A bucket with the values of the parameters."""
        bucket = buffer(self.size)
        for slot in self.slots:
            slot.view(bucket).copy_(value_of(slot.name))
        return bucket

    def describe(self) -> list[list[Any]]:
        """Plain data that tell this layout from others."""
        return [[slot.name, list(slot.shape), str(slot.dtype), slot.trained] for slot in self.slots]


class Short:
    """Buckets in a shorter floating-point type, with one scale a block, a power of two (so that scaling rounds nothing).

    Attributes:
        lost: the share of trained numbers that the last step's rounding left as they were.
    """

    def __init__(self, dtype: torch.dtype, rounding: str) -> None:
        self.dtype, self.rounding = dtype, rounding

    def size(self, layout: Layout) -> int:
        return self._count(layout) * self.dtype.itemsize + SCALE

    def narrow(self, bucket: Tensor, layout: Layout, key: int) -> UInt8[Tensor, "bytes"]:
        """The short bucket of a bucket; `key` seeds stochastic rounding."""
        short = buffer(self.size(layout)).to(bucket.device)
        codes, start = short[:-SCALE].view(self.dtype), 0
        views = [slot.view(bucket).reshape(-1) for slot in layout.slots]
        largest = max((view.abs().max().item() for view in views if len(view)), default=0.0)
        scale = scale_for(largest, self.dtype)
        draws = torch.Generator(bucket.device).manual_seed(key) if self.rounding == "stochastic" else None
        for part in itertools.chain.from_iterable(view.split(CHUNK) for view in views):
            codes[start : start + len(part)] = rounded(part / scale, self.dtype, draws)
            start += len(part)
        short[-SCALE:].copy_(torch.tensor([scale], dtype=torch.float64).view(torch.uint8))
        return short

    def widen(self, short: Tensor, layout: Layout) -> UInt8[Tensor, "bytes"]:
        """The bucket of a short one."""
        bucket = buffer(layout.size).to(short.device)
        scale = self._scale(short)
        for slot, codes in self._parts(short, layout):
            slot.view(bucket).copy_(codes.view(slot.shape)).mul_(scale)
        return bucket

    def kept(self, before: Tensor, after: Tensor, layout: Layout) -> tuple[int, int]:
        """(trained numbers whose value is the same, trained numbers)."""
        same = count = 0
        change = self._scale(after) / self._scale(before)
        for (slot, old), (_, new) in zip(self._parts(before, layout), self._parts(after, layout), strict=True):
            if slot.trained:
                pairs = zip(old.split(CHUNK), new.split(CHUNK), strict=True)
                same += sum(int((one.float() == two.float() * change).sum()) for one, two in pairs)
                count += len(old)
        return same, count

    def _scale(self, short: Tensor) -> float:
        return short[-SCALE:].clone().view(torch.float64).item()

    def _parts(self, short: Tensor, layout: Layout) -> Iterator[tuple[Slot, Tensor]]:
        """The slots with their codes, flat."""
        sizes = [math.prod(slot.shape) for slot in layout.slots]
        return zip(layout.slots, short[:-SCALE].view(self.dtype).split(sizes), strict=True)

    def _count(self, layout: Layout) -> int:
        return sum(math.prod(slot.shape) for slot in layout.slots)


def scale_for(largest: float, dtype: torch.dtype) -> float:
    """The smallest power of two by which the largest value comes into the type's range."""
    return 2.0 ** math.ceil(math.log2(largest / torch.finfo(dtype).max)) if largest > 0 and math.isfinite(largest) else 1.0


def rounded(values: Float[Tensor, "n"], dtype: torch.dtype, draws: torch.Generator | None = None) -> Tensor:
    """Values in a shorter type: the nearest, or (with draws) the one below or above, so that the mean is the value itself."""
    nearest = values.to(dtype)
    if draws is None:
        return nearest
    codes, wide = torch.uint8 if dtype.itemsize == 1 else torch.int16, torch.promote_types(values.dtype, torch.float32)
    size, near = values.abs().to(wide), nearest.abs()
    below = near.view(codes) - (near.to(wide) > size).to(codes)  # codes of positive numbers are in their order
    low, high = below.view(dtype).to(wide), (below + 1).view(dtype).to(wide)
    up = torch.rand(values.shape, generator=draws, device=values.device, dtype=wide) < (size - low) / (high - low)
    return torch.copysign(torch.where(up, high, low), values.to(wide)).to(dtype)


class Store:
    """Blocks that are attached to the model one after the other; this one keeps them where they are.

    Attributes:
        bytes_read, bytes_written: of blocks, so far.
        attached, most_attached: blocks on the device now, and at most.
        lost: (trained numbers whose short form a step left as it was, trained numbers), of the last walk that wrote.
    """

    streams = False

    def __init__(self, model: nn.Module, blocks: list[dict[str, nn.Parameter]], device: torch.device) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.layouts = [Layout(block) for block in blocks]
        self.bytes_read = self.bytes_written = self.attached = self.most_attached = 0
        self.lost = (0, 0)

    def walk(self, write: bool = True) -> Generator[int, None, None]:
        """The numbers of the blocks, each attached while it is its turn."""
        yield from range(len(self.blocks))

    def end_walk(self) -> None:
        """What the last walk wrote is what the next one reads."""


class HostStore(Store):
    """Blocks in host memory, pinned where the device is a GPU."""

    streams = True

    def __init__(
        self, model: nn.Module, blocks: list[dict[str, nn.Parameter]], device: torch.device, short: Short | None, overlap: bool, seed: int
    ) -> None:
        super().__init__(model, blocks, device)
        self.short, self.overlap, self.seed, self.walks = short, overlap, seed, 0
        self.buckets: dict[int, Tensor] = {}
        self._counting = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_counting"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counting = threading.Lock()

    @property
    def block_bytes(self) -> int:
        """Of all blocks, as they are stored."""
        return sum(self.short.size(layout) if self.short else layout.size for layout in self.layouts)

    def fill(self, number: int, value_of: Callable[[str], Tensor]) -> None:
        """Write a block for the next walk (after `end_walk`) to read; its parameters in the model become empty."""
        bucket = self.layouts[number].pack(value_of)
        self._save(number, self.short.narrow(bucket, self.layouts[number], self._key(number)) if self.short else bucket)
        self._detach(number)
        release()

    def walk(self, write: bool = True) -> Generator[int, None, None]:
        count, self.lost, self.attached = len(self.blocks), (0, 0) if write else self.lost, 0
        with contextlib.ExitStack() as stack:
            reader, writer = (
                stack.enter_context(ThreadPoolExecutor(1) if self.overlap else contextlib.nullcontext(_AtOnce())) for _ in range(2)
            )
            coming: Future[Any] | None = reader.submit(self._take, 0)
            going: deque[Future[None]] = deque()
            for number in range(count):
                assert coming is not None
                bucket, stored = coming.result()
                while len(going) > 1:
                    going.popleft().result()  # else there would be four
                coming = reader.submit(self._take, number + 1) if number + 1 < count else None
                self._attach(number, bucket)
                try:
                    yield number
                finally:
                    self._detach(number)
                going.append(writer.submit(self._give, number, bucket, stored, write, self._event()))
                del bucket, stored
                release()
            for each in going:
                each.result()

    def end_walk(self) -> None:
        self.walks += 1

    def _take(self, number: int) -> tuple[Tensor, Tensor | None]:
        """(the block's bucket on the device, its stored form where that is shorter)."""
        with self._counting:
            self.attached += 1
            self.most_attached = max(self.most_attached, self.attached)
        stored = self._load(number)
        self.bytes_read += stored.nbytes
        with self._stream():
            stored = stored.to(self.device, non_blocking=True)
            bucket = self.short.widen(stored, self.layouts[number]) if self.short else stored
        return bucket, stored if self.short else None

    def _give(self, number: int, bucket: Tensor, stored: Tensor | None, write: bool, computed: Any) -> None:
        if write:
            with self._stream(computed):
                leaving = self.short.narrow(bucket, self.layouts[number], self._key(number)) if self.short else bucket
                if self.short and stored is not None:
                    same, count = self.short.kept(stored, leaving, self.layouts[number])
                    self.lost = (self.lost[0] + same, self.lost[1] + count)
                leaving = leaving.cpu()
            self._save(number, leaving)
            self.bytes_written += leaving.nbytes
        with self._counting:
            self.attached -= 1

    def _load(self, number: int) -> UInt8[Tensor, "bytes"]:
        kept = self.buckets[number]
        return kept if self.device.type == "cuda" else buffer(kept.nbytes).copy_(kept)  # what is being changed must not be what is kept

    def _save(self, number: int, bucket: UInt8[Tensor, "bytes"]) -> None:
        self.buckets[number] = bucket.pin_memory() if self.device.type == "cuda" else bucket

    def _key(self, number: int) -> int:
        """The seed of a block's stochastic rounding after so many walks."""
        return (self.seed * 1_000_003 + self.walks) * 65_537 + number

    @contextlib.contextmanager
    def _stream(self, after: Any = None) -> Iterator[None]:
        """A stream of its own for copies to and from a GPU, waited for at the end; nothing on a CPU."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self.device)) as _:
            if after is not None:
                after.wait()
            yield
            torch.cuda.current_stream().synchronize()

    def _event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _attach(self, number: int, bucket: Tensor) -> None:
        for slot in self.layouts[number].slots:
            self._put(slot, slot.view(bucket))

    def _detach(self, number: int) -> None:
        """The parameters become empty: whoever uses them meanwhile is told so by torch ("meta")."""
        for slot in self.layouts[number].slots:
            self._put(slot, torch.empty(slot.shape, dtype=slot.dtype, device="meta"))

    def _put(self, slot: Slot, value: Tensor) -> None:
        owner, leaf = owner_of(self.model, slot.name)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=slot.trained)


class DiskStore(HostStore):
    """Blocks in a directory, a file each, in two generations: a walk reads one and writes the other.

    Args:
        folder: the directory.
        generation: 0 or 1, the one that is whole.
    """

    def __init__(self, *words: Any, folder: Path, generation: int = 1) -> None:
        super().__init__(*words)
        self.folder, self.generation = folder, generation
        self._spare: deque[Tensor] = deque(maxlen=3)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"the blocks lie in {self.folder}, which a copy would write into as well; use save_pretrained or state_dict")

    def file(self, number: int, generation: int) -> Path:
        return self.folder / f"block-{number:05}.{generation}.bin"

    def end_walk(self) -> None:
        super().end_walk()
        self.generation = 1 - self.generation

    def _load(self, number: int) -> UInt8[Tensor, "bytes"]:
        layout = self.layouts[number]
        bucket = self._room(self.short.size(layout) if self.short else layout.size)
        file = self.file(number, self.generation)
        with open(file, "rb") as opened:
            read = opened.readinto(bucket.numpy().data)
        if read != bucket.nbytes:
            raise ValueError(f"{file} has {read} bytes; expected {bucket.nbytes}: the store is cut off, take another")
        return bucket

    def _room(self, size: int) -> UInt8[Tensor, "size"]:
        """A buffer that an earlier block has left, or a new one: the system takes longer to hand out fresh memory than to fill it."""
        while self._spare:
            if (left := self._spare.popleft()).nbytes == size:
                return left
        return buffer(size)

    def _give(self, number: int, bucket: Tensor, stored: Tensor | None, write: bool, computed: Any) -> None:
        super()._give(number, bucket, stored, write, computed)
        if write and bucket.device.type == "cpu":  # of a walk that only reads, others may hold the values
            self._spare.append(bucket if stored is None else stored)

    def _save(self, number: int, bucket: UInt8[Tensor, "bytes"]) -> None:
        with whole_file(self.file(number, 1 - self.generation), overwrite=True) as part, open(part, "wb") as opened:
            opened.write(bucket.numpy().data)


class _AtOnce(Executor):
    """Work that is done where it is handed in."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done
