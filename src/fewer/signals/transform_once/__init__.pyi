from .fno import FNO
from .model import T1, T1UNet, vp_std
from .modes import ModeDataset, ModeLoss, Modes, ModeTargets, select_modes
from .solvers import burgers, navier_stokes, spectral_resize
from .transforms import dct, idct, truncated_dct

__all__ = [
    "FNO", "T1", "ModeDataset", "ModeLoss", "ModeTargets", "Modes", "T1UNet", "burgers", "dct", "idct", "navier_stokes", "select_modes",
    "spectral_resize", "truncated_dct", "vp_std",
]  # fmt: skip
