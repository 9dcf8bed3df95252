"""What the side by side is about: images upside down for a network that knows them upright, or a user's texts for a language model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.data import fetch_smollm2
from fewer.devices import one_thread
from fewer.errors import UserError
from fewer.federated._shared.problems import load_trained
from fewer.federated.ffa_lora.adapters import Init, freeze_a
from fewer.fitting import fit_steps
from fewer.inputs import read_pairs
from fewer.tasks import image_task, mlp

Pair = tuple[Tensor, Tensor]
IMAGES, KNOWN = 16_000, 10 / 16  # of which the first are learnt upright by the base, the others lie upside down with the clients
VALIDATION, TEST, SIDE = 1_000, 5_000, 14
WIDTHS, EPOCHS, BATCH, LR = (256, 256, 256), 8, 128, 1e-3  # of the base
LONGEST = 128  # tokens of a text that are read, its last ones


@dataclass(frozen=True)
class Adapting:
    """A base model, what is adapted in it, and the examples that it is adapted to.

    Attributes:
        base_of: seed -> the model as everybody has it. Each seed has one of its own where it is trained here: at a constant rate the last
            steps move its accuracy by several points, and what is adapted with it.
        targets: names of the layers that get adapters.
        rank, alpha: of the adapters.
        train, validation, test: (x, y) each; the clients hold `train`.
        name: the data's.
        beside: arrays beside the training examples: "client" says who holds which.
    """

    base_of: Callable[[int], nn.Module]
    targets: list[str]
    rank: int
    alpha: int
    train: Pair
    validation: Pair
    test: Pair
    name: str
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)

    def adapted(self, seed: int, frozen: bool = True, init: Init = "kaiming") -> Any:
        """A copy of the base with adapters, A from the seed; frozen, or trained as in LoRA."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets)
        model = freeze_a(get_peft_model(copy.deepcopy(self.base_of(seed)), config), seed, init)  # pyright: ignore[reportArgumentType] - any module
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name or ("lora_A" in name and not frozen))
        return model


def upside_down(data: str) -> Adapting:
    """Images, the base trained on upright ones, clients and tests on others that stand on their heads.

    Raises:
        UserError: no such set or file, or what the file holds cannot be used.
    """
    task = image_task(data, train=IMAGES, validation=VALIDATION, test=TEST, side=SIDE, normalise=(0.0, 1.0), beside=["client"])
    known = round(KNOWN * len(task.train[0]))
    x, y = task.train

    def base_of(seed: int) -> nn.Module:
        return trained_once(mlp(task.shape, task.classes, WIDTHS), x[:known], y[:known], seed)

    layers = mlp(task.shape, task.classes, WIDTHS).named_modules()
    square = [name for name, layer in layers if isinstance(layer, nn.Linear) and layer.in_features == layer.out_features]
    turned = [(each.flip(-2), labels) for each, labels in ((x[known:], y[known:]), task.validation, task.test)]
    beside = {name: array[known:] for name, array in task.beside.items()}
    return Adapting(base_of, square, 8, 8, *turned, name=task.name, beside=beside)


def trained_once(base: nn.Module, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """The base trained on these images, or loaded as it was before; on one thread, so that sums do not depend on their number."""
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        for layer in base.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

        def train() -> None:
            steps, optimizer = EPOCHS * -(-len(x) // BATCH), torch.optim.Adam(base.parameters(), lr=LR)
            rows = (part for _ in range(EPOCHS) for part in torch.randperm(len(x)).split(BATCH))
            fit_steps(optimizer, lambda some: nn.functional.cross_entropy(base(x[some]), y[some]), rows, steps)

        load_trained(base, x, y, ("adapter-bases", "mlp"), [EPOCHS, BATCH, LR], train)
    return base.requires_grad_(False)


class LabelScores(nn.Module):
    """A causal language model as a classifier: what it expects after a text, of the labels' first tokens alone. No head is trained.

    Args:
        lm: a transformers causal language model.
        words: the labels' first tokens [classes].
        pad: the token that texts are filled up with on the left.
    """

    def __init__(self, lm: Any, words: Int[Tensor, "classes"], pad: int) -> None:
        super().__init__()
        self.lm, self.pad = lm, pad
        self.register_buffer("words", words, persistent=False)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B classes"]:
        there = (tokens != self.pad).long()
        scores = self.lm(input_ids=tokens, attention_mask=there, use_cache=False, logits_to_keep=1).logits
        return scores[:, -1, self.words].float()


def texts(model: str, file: str) -> Adapting:
    """A user's texts and labels for a language model with adapters on the queries' and values' projections.

    Args:
        model: a transformers directory; "": SmolLM2-135M.
        file: JSONL, an object a line with "text" and "label".

    Raises:
        UserError: no file is given, or its labels cannot be told apart by their first tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not file:
        raise UserError('--full is about your own texts: --set text=FILE.jsonl, an object {"text": ..., "label": ...} a line')
    pairs = read_pairs(file, ("text", "label"))
    labels = sorted({label for _, label in pairs})
    folder = model or fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = [tokenizer(f" {label}", add_special_tokens=False).input_ids[0] for label in labels]
    if not 2 <= len(set(words)) == len(labels):
        raise UserError(
            f"{file}: the labels {', '.join(labels[:5])} begin with {len(set(words))} tokens; expected one each, of two labels at least"
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [[token for token in tokenizer(text).input_ids if token != pad][-LONGEST:] for text, _ in pairs]
    wide = max(map(len, rows))
    x = torch.tensor([[pad] * (wide - len(row)) + row for row in rows])
    y = torch.tensor([labels.index(label) for _, label in pairs])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    tenth = max(1, len(x) // 10)
    test, validation, train = order[: 2 * tenth], order[2 * tenth : 3 * tenth], order[3 * tenth :]
    lm = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    base = LabelScores(lm, torch.tensor(words), pad).requires_grad_(False)
    split = [(x[part], y[part]) for part in (train, validation, test)]
    return Adapting(lambda seed: base, ["q_proj", "v_proj"], 8, 8, *split, name=file)
