from .contamination import SequenceContamination
from .counting.costs import Constants, Plan, calibrate
from .differences import difference_counts
from .distances import hamming_distances, plan
from .profile import hamming_profile
from .text_index import TextIndex

__all__ = [
    "Constants", "Plan", "SequenceContamination", "TextIndex", "calibrate", "difference_counts", "hamming_distances", "hamming_profile", "plan",
]  # fmt: skip
