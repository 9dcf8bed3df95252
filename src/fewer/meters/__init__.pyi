from .counters import count, counting
from .energy import energy_source
from .flops import count_flops
from .measurement import Measurement, measure
from .resident_memory import peak_resident_memory
from .tensor_memory import TensorMemory, memory_for, tensor_memory

__all__ = [
    "Measurement", "TensorMemory", "count", "count_flops", "counting", "energy_source", "measure", "memory_for", "peak_resident_memory",
    "tensor_memory",
]  # fmt: skip
