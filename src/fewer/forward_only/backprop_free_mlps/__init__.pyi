from .cascaded_forward import CascadedForwardCNN, CascadedForwardConfig, fit_cascaded_forward
from .estimator.classifier import BackpropagationConfig, Epoch, History, LocalLearningClassifier, cnn, fit_backpropagation, mlp
from .estimator.saved_form import load_model, save_model
from .forward_forward import ForwardForwardConfig, ForwardForwardMLP, fit_forward_forward
from .mono_forward import MonoForwardConfig, MonoForwardMLP, fit_mono_forward

__all__ = [
    "BackpropagationConfig",
    "CascadedForwardCNN",
    "CascadedForwardConfig",
    "Epoch",
    "ForwardForwardConfig",
    "ForwardForwardMLP",
    "History",
    "LocalLearningClassifier",
    "MonoForwardConfig",
    "MonoForwardMLP",
    "cnn",
    "fit_backpropagation",
    "fit_cascaded_forward",
    "fit_forward_forward",
    "fit_mono_forward",
    "load_model",
    "mlp",
    "save_model",
]
