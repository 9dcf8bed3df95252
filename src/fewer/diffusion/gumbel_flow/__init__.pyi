from .cnn import SequenceCNN
from .guidance import STGuidance
from .path import GumbelSoftmaxPath, PathSample, gumbel_flow_loss, gumbel_score_loss
from .sampling import Samples, sample

__all__ = [
    "GumbelSoftmaxPath", "PathSample", "STGuidance", "Samples", "SequenceCNN", "gumbel_flow_loss", "gumbel_score_loss", "sample",
]  # fmt: skip
