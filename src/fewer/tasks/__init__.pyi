from .digit_features import frechet_distance
from .digits_diffusion import DigitsDiffusion, load_digits_diffusion
from .images import IMAGES_HELP, ImageTask, accuracy, image_task
from .language_corpus import Corpus, standard_library, text_corpus
from .lm_training import token_loss
from .networks import ResidualBlock, conv_net, mlp, resnet18, resnet20
from .small_lm import PRESETS, Preset, SmallLM, fetch_small_lm, load_small_lm, micro_lm, open_lm

__all__ = [
    "IMAGES_HELP",
    "PRESETS",
    "Corpus",
    "DigitsDiffusion",
    "ImageTask",
    "Preset",
    "ResidualBlock",
    "SmallLM",
    "accuracy",
    "conv_net",
    "fetch_small_lm",
    "frechet_distance",
    "image_task",
    "load_digits_diffusion",
    "load_small_lm",
    "micro_lm",
    "mlp",
    "open_lm",
    "resnet18",
    "resnet20",
    "standard_library",
    "text_corpus",
    "token_loss",
]  # fmt: skip
