from .digit_features import frechet_distance
from .digits_diffusion import DigitsDiffusion, load_digits_diffusion
from .language_corpus import Corpus, standard_library, text_corpus
from .lm_training import token_loss
from .small_lm import PRESETS, Preset, SmallLM, fetch_small_lm, load_small_lm, micro_lm, open_lm

__all__ = [
    "PRESETS",
    "Corpus",
    "DigitsDiffusion",
    "Preset",
    "SmallLM",
    "fetch_small_lm",
    "frechet_distance",
    "load_digits_diffusion",
    "load_small_lm",
    "micro_lm",
    "open_lm",
    "standard_library",
    "text_corpus",
    "token_loss",
]  # fmt: skip
