from .conv import depthwise_conv1d, fft_conv
from .layers import FlashFFTConv, LongConv, StreamingConv
from .monarch import monarch_dft, monarch_idft
from .plan import Constants, Plan, calibrate, make_plan

__all__ = [
    "Constants", "FlashFFTConv", "LongConv", "Plan", "StreamingConv", "calibrate", "depthwise_conv1d", "fft_conv", "make_plan", "monarch_dft",
    "monarch_idft",
]  # fmt: skip
