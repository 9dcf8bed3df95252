"""A fitted classifier as a folder of two files: weights (safetensors) and what they belong to (JSON). Nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.utils.validation import check_is_fitted

from fewer.files import made_whole, read_json, read_weights
from fewer.forward_only.backprop_free_mlps.estimator.classifier import METHODS, LocalLearningClassifier

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "fewer local learning 1"


def save_model(classifier: LocalLearningClassifier, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a fitted classifier as a folder; it appears whole or not at all.

    Args:
        classifier: fitted, its labels integers, booleans or strings.
        folder: where to; made, if it does not exist or is empty.
        overwrite: replace a model that fewer wrote there. A folder that holds anything else is never replaced.

    Raises:
        FileExistsError: the folder is not empty, or holds what fewer did not write there.
        NotFittedError: the classifier is not fitted.
        ValueError: labels of another kind.

    Examples:
        >>> import tempfile
        >>> x = np.random.default_rng(0).normal(size=(100, 4))
        >>> classifier = LocalLearningClassifier(hidden_sizes=(8,), epochs=2, random_state=0).fit(x, x[:, 0] > 0)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save_model(classifier, f"{parent}/model")
        ...     same = load_model(f"{parent}/model")
        >>> bool((same.predict(x) == classifier.predict(x)).all())
        True
    """
    check_is_fitted(classifier)
    description = _describe(classifier)
    with made_whole(folder, overwrite) as part:
        weights = {name: value.detach().cpu().contiguous() for name, value in classifier.model_.state_dict().items()}
        save_file(weights, part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(description, indent=2, default=_plain) + "\n", encoding="utf8")


def load_model(folder: str | Path) -> LocalLearningClassifier:
    """The classifier that `save_model` wrote, on the CPU; its `history_` is not kept.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: a file is broken, or the two do not belong together.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected a folder that `fewer train-local` or save_model wrote")
    try:
        classifier = _classifier(read_json(folder / CONFIG))
        with torch.device("meta"):  # the sizes are only a claim until the weights bear them out: nothing of theirs is allocated
            classifier.model_ = classifier.build_network()
        weights = read_weights(folder / WEIGHTS)
        for name, value in weights.items():
            if value.dtype != torch.float32 and value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}; expected torch.float32")
        classifier.model_.load_state_dict(weights, assign=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{folder} holds no model that can be read ({type(error).__name__}: {why}); write it anew with train-local"
        ) from error
    classifier.model_.eval()
    return classifier


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{value!r} is no plain data")


def _describe(classifier: LocalLearningClassifier) -> dict[str, Any]:
    """What `config.json` says."""
    classes = classifier.classes_
    if classes.dtype.kind not in "iubU" and not all(isinstance(label, str) for label in classes):
        raise ValueError(f"the labels are {classes.dtype}; expected integers, booleans or strings: convert them before fit")
    parameters = classifier.get_params() | {"config": classifier.config and asdict(classifier.config)}
    del parameters["random_state"]  # of the fit, and not always plain data
    return {
        "format": FORMAT,
        "parameters": parameters | {"device": "cpu"},
        "features": classifier.n_features_in_,
        "classes": classes.tolist(),
        "mean": classifier.mean_,
        "scale": classifier.scale_,
    }


def _classifier(description: dict[str, Any]) -> LocalLearningClassifier:
    """The classifier that `config.json` describes, without weights."""
    if description["format"] != FORMAT:
        raise ValueError(f"its format is {description['format']!r}; expected {FORMAT!r}")
    parameters: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in description["parameters"].items()
    }
    if parameters["config"] is not None:
        parameters["config"] = METHODS[parameters["method"]].config(**parameters["config"])
    classifier = LocalLearningClassifier(**parameters)
    classifier.classes_ = np.array(description["classes"])
    if classifier.classes_.dtype.kind not in "iubU" or classifier.classes_.ndim != 1:
        raise ValueError(f"its classes are {classifier.classes_.dtype}; expected integers, booleans or strings")
    classifier.n_features_in_ = int(description["features"])
    classifier.mean_, classifier.scale_ = float(description["mean"]), float(description["scale"])
    return classifier
