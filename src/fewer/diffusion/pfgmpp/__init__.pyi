from .loss import EDMPrecond, PFGMPPLoss
from .perturbation import perturb, posterior_mean, radius_quantiles, student_t_noise
from .quantization import quantize_weights
from .sampling import sample
from .scheduler import PFGMPPHeunScheduler

__all__ = [
    "EDMPrecond",
    "PFGMPPHeunScheduler",
    "PFGMPPLoss",
    "perturb",
    "posterior_mean",
    "quantize_weights",
    "radius_quantiles",
    "sample",
    "student_t_noise",
]
