from .averages import MovingAverage, up_and_down
from .examples import Batches, Examples, batches_of, check_features, check_labels, check_validation, check_width
from .history import Callback, Epoch, History
from .loops import fit_stages, fit_steps, mean_loss_and_accuracy, mean_losses_and_accuracies, over_batches
from .states import BestState, LastState, all_finite, evaluating

__all__ = [
    "Batches", "BestState", "Callback", "Epoch", "Examples", "History", "LastState", "MovingAverage", "all_finite", "batches_of",
    "check_features", "check_labels", "check_validation", "check_width", "evaluating", "fit_stages", "fit_steps", "mean_loss_and_accuracy",
    "mean_losses_and_accuracies", "over_batches", "up_and_down",
]  # fmt: skip
