from .gaussian_mixture import GaussianMixture
from .noise_schedule import NoiseSchedule
from .prediction import PREDICTIONS, as_epsilon, to_epsilon

__all__ = ["PREDICTIONS", "GaussianMixture", "NoiseSchedule", "as_epsilon", "to_epsilon"]
