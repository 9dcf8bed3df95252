from .counters import count, counting
from .energy import energy_source
from .flops import count_flops
from .measurement import Measurement, measure
from .resident_memory import peak_resident_memory
from .tensor_memory import TensorMemory, memory_for, tensor_memory
from .training import SavedBytes, median_seconds, optimizer_bytes, saved_bytes

__all__ = [
    "Measurement", "SavedBytes", "TensorMemory", "count", "count_flops", "counting", "energy_source", "measure", "median_seconds",
    "memory_for", "optimizer_bytes", "peak_resident_memory", "saved_bytes", "tensor_memory",
]  # fmt: skip
