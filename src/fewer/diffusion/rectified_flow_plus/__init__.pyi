from .pairs import EDMSampler, PairDataset, generate_pairs, real_pairs
from .premetric import (
    FeatureDistance,
    LPIPSHuber,
    PseudoHuber,
    PyramidHuber,
    SquaredL2,
    TeacherFeatures,
    classifier_distance,
    lpips_distance,
)
from .reflow import ReflowConfig, UShapedTimesteps, sample_t, train_reflow
from .sampler import ReflowScheduler, invert, sample, slerp, straightness
from .velocity import VelocityFromEDM, VelocityFromVP

__all__ = [
    "EDMSampler",
    "FeatureDistance",
    "LPIPSHuber",
    "PairDataset",
    "PseudoHuber",
    "PyramidHuber",
    "ReflowConfig",
    "ReflowScheduler",
    "SquaredL2",
    "TeacherFeatures",
    "UShapedTimesteps",
    "VelocityFromEDM",
    "VelocityFromVP",
    "classifier_distance",
    "generate_pairs",
    "invert",
    "lpips_distance",
    "real_pairs",
    "sample",
    "sample_t",
    "slerp",
    "straightness",
    "train_reflow",
]
