from .language_corpus import Corpus, standard_library, text_corpus
from .lm_training import token_loss
from .small_lm import PRESETS, Preset, SmallLM, fetch_small_lm, micro_lm, small_lm

__all__ = [
    "PRESETS", "Corpus", "Preset", "SmallLM", "fetch_small_lm", "micro_lm", "small_lm", "standard_library", "text_corpus", "token_loss",
]  # fmt: skip
