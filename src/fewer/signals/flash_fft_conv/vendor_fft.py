"""The machine's own real FFT, its plans kept: torch makes MKL's anew for each call, which costs more than the transforms of a small block."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from jaxtyping import Complex, Float
from torch import Tensor

# MKL's words, from its header mkl_dfti.h
REAL, COMPLEX_COMPLEX, NOT_INPLACE = 33, 39, 44
NUMBER_OF_TRANSFORMS, CONJUGATE_EVEN_STORAGE, PLACEMENT, INPUT_DISTANCE, OUTPUT_DISTANCE, THREAD_LIMIT = 7, 10, 11, 14, 15, 27


class VendorFFT:
    """Real FFTs of size n, 1/n folded into the filter's spectrum; with `bins` the others are neither multiplied nor kept.

    >>> transform = VendorFFT(4)
    >>> k, x = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    >>> transform.synthesise(transform.analyse(x) * transform.filter(k)).round()
    tensor([[ 1., 12., 23., 30.]])
    """

    def __init__(self, n: int, bins: int = 0, weight: Float[Tensor, "bins"] | None = None) -> None:
        self.n, self.bins, self.weight = n, bins or n // 2 + 1, weight

    def analyse(self, x: Float[Tensor, "... n"]) -> Complex[Tensor, "... bins"]:
        return _forward(x, self.n)[..., : self.bins]

    def synthesise(self, spectrum: Complex[Tensor, "... bins"]) -> Float[Tensor, "... n"]:
        """The inverse without 1/n."""
        missing = self.n // 2 + 1 - self.bins
        return _inverse(torch.nn.functional.pad(spectrum, (0, missing)) if missing else spectrum, self.n)

    def filter(self, k: Float[Tensor, "H K"]) -> Complex[Tensor, "H bins"]:
        return self._weighted(self.analyse(torch.nn.functional.pad(k, (0, self.n - k.shape[-1]))))

    def taps(self, spectrum: Complex[Tensor, "H bins"]) -> Float[Tensor, "H n"]:
        return self.synthesise(self._weighted(spectrum))

    def _weighted(self, spectrum: Tensor) -> Tensor:
        return spectrum.mul_(1 / self.n if self.weight is None else self.weight / self.n)


def _forward(x: Tensor, n: int) -> Tensor:
    rows = x.numel() // n
    if not has_plans(x):
        return torch.fft.rfft(x)
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], n // 2 + 1, dtype=x.dtype.to_complex())
    _plan(n, rows, x.dtype, False, torch.get_num_threads()).run(x, out)
    return out


def _inverse(spectrum: Tensor, n: int) -> Tensor:
    rows = spectrum.numel() // spectrum.shape[-1]
    if not has_plans(spectrum):
        return torch.fft.irfft(spectrum, n=n, norm="forward")
    spectrum = spectrum.contiguous().resolve_conj()
    out = torch.empty(*spectrum.shape[:-1], n, dtype=spectrum.dtype.to_real())
    _plan(n, rows, out.dtype, True, torch.get_num_threads()).run(spectrum, out)
    return out


def has_plans(x: Tensor) -> bool:
    """Whether plans can be kept for it: on a CPU, with a torch that carries MKL."""
    return x.device.type == "cpu" and _mkl() is not None


@functools.cache
def _mkl() -> ctypes.CDLL | None:
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        return library if hasattr(library, "DftiCommitDescriptor") else None
    except (OSError, StopIteration):
        return None


class _Plan:
    """A committed descriptor of MKL for so many real rows of length n, out of place, without a factor."""

    def __init__(self, n: int, rows: int, dtype: torch.dtype, inverse: bool, threads: int) -> None:
        library = _mkl()
        assert library is not None
        self.handle, self.free = ctypes.c_void_p(), library.DftiFreeDescriptor
        make = library.DftiCreateDescriptor_d_1d if dtype == torch.float64 else library.DftiCreateDescriptor_s_1d
        self._right(make(ctypes.byref(self.handle), REAL, ctypes.c_long(n)))
        there, back = (n // 2 + 1, n) if inverse else (n, n // 2 + 1)
        words = {
            PLACEMENT: NOT_INPLACE, CONJUGATE_EVEN_STORAGE: COMPLEX_COMPLEX, NUMBER_OF_TRANSFORMS: rows, INPUT_DISTANCE: there,
            OUTPUT_DISTANCE: back, THREAD_LIMIT: min(threads, rows),
        }  # fmt: skip
        for word, value in words.items():  # a row is one thread's, so that results do not depend on their number
            self._right(library.DftiSetValue(self.handle, word, ctypes.c_long(value)))
        self._right(library.DftiCommitDescriptor(self.handle))
        self.compute = library.DftiComputeBackward if inverse else library.DftiComputeForward

    def run(self, x: Tensor, out: Tensor) -> None:
        self._right(self.compute(self.handle, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())))

    def _right(self, status: int) -> None:
        if status:
            raise RuntimeError(f"MKL's FFT says {status}; expected 0: please report it, with torch's version {torch.__version__}")

    def __del__(self) -> None:
        self.free(ctypes.byref(self.handle))


_plan = functools.lru_cache(64)(_Plan)
