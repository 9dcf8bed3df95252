from .calibration import CalibrationReport, calibrate
from .config import FFNSkipConfig
from .skipping import disable_ffn_skip, enable_ffn_skip, ffn_skip, stats_of, teacher_forced
from .stats import FFNSkipStats

__all__ = [
    "CalibrationReport", "FFNSkipConfig", "FFNSkipStats", "calibrate", "disable_ffn_skip", "enable_ffn_skip", "ffn_skip", "stats_of",
    "teacher_forced",
]  # fmt: skip
