"""Whole runs: ZO2 in transformers' Trainer (its data, schedule, logging and callbacks, no backward pass), and journals done again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from fewer.files import check_new, discard
from fewer.language.zo2.checkpoints import read_journal
from fewer.language.zo2.mezo import ZO2Config
from fewer.language.zo2.streaming import ZO2


class _Rate(torch.optim.SGD):
    """Carries the learning rate that a schedule changes; the steps are taken elsewhere."""

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class ZO2Trainer(Trainer):
    """A Trainer whose training step is ZO2's.

    Args:
        model: a ZO2, or a model that becomes one with `zo2_config` (its blocks then leave it for the store).
        zo2_config: see `ZO2Config`; the learning rate is that of the TrainingArguments.
        words: as Trainer takes them. Gradients are none, so none are accumulated or clipped: use `ZO2Config.micro_batches`.

    Attributes:
        zo2: the ZO2, with its journal.

    Raises:
        ValueError: gradient accumulation is asked for.
    """

    def __init__(self, model: nn.Module | ZO2, args: Any, *, zo2_config: ZO2Config | None = None, **words: Any) -> None:
        if args.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; expected 1, as there are no gradients: use ZO2Config(micro_batches=...)"
            )
        self.zo2 = model if isinstance(model, ZO2) else ZO2(model, zo2_config)
        super().__init__(model=cast(Any, self.zo2.model), args=args, **words)
        self.accelerator.device_placement = False  # the model is where it belongs, in parts

    def _move_model_to_device(self, *_: Any) -> None: ...

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        self.optimizer = _Rate([nn.Parameter(torch.zeros(()))], lr=self.args.learning_rate)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        self.zo2.lr = cast(torch.optim.Optimizer, self.optimizer).param_groups[0]["lr"]
        return torch.tensor(self.zo2.step(dict(inputs)).loss)

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone: logits of a model in parts would be all there is to keep in memory."""
        return torch.tensor(self.zo2.evaluate(dict(inputs))), None, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A directory that transformers loads, every update applied."""
        folder = Path(output_dir or str(self.args.output_dir))
        part = folder / "model"
        self.zo2.save_pretrained(part, self.processing_class, overwrite=True)
        for file in part.iterdir():  # beside what the Trainer itself writes there
            file.replace(folder / file.name)
        discard(part)


def replay(
    model_dir: str | Path, journal: str | Path, out_dir: str | Path, *, store_dir: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Make a fine-tuned model again from its base and its journal, bit for bit and without data: perturbations and updates alone.

    Args:
        model_dir: the base, a directory that transformers wrote.
        journal: `journal.json` of the fine-tuned model.
        out_dir: the directory to write.
        store_dir: a new directory for the blocks of a model that memory does not hold.

    Raises:
        ValueError: no journal, or one of another model.
    """
    check_new(out_dir, overwrite, inputs=[model_dir, journal], option="out_dir")
    base, config, updates = read_journal(Path(journal))
    if store_dir is not None:
        config = dataclasses.replace(config, store="disk", store_dir=str(store_dir))
    zo2 = ZO2.from_pretrained(model_dir, config)
    if zo2.base != base:
        raise ValueError(
            f"{journal} is of a model with digest {base}; expected {zo2.base}, that of {model_dir}: name the model that it began with"
        )
    for update in updates:
        zo2.redo(update)
    return zo2.save_pretrained(out_dir, overwrite=overwrite)
