"""What is designed here: single letters of a known law, peptides guided to kill bacteria, and what stands before a fly's genes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import load_peptides, load_promoters
from fewer.data.made_once import WEIGHTS, folder_of, made_once
from fewer.devices import one_thread
from fewer.diffusion.gumbel_flow.cnn import EMBEDDING, SequenceCNN, time_embedding
from fewer.diffusion.gumbel_flow.path import GumbelSoftmaxPath, Model, gumbel_flow_loss, safe_log
from fewer.errors import UserError
from fewer.fitting import fit_steps, up_and_down
from fewer.inputs import read_fasta
from fewer.tasks.sequences import ALPHABETS, composition, encoded, families, one_hots

VERSION = 1  # of what is trained: raise it when the code makes another network from the same settings
Net = TypeVar("Net", bound=nn.Module)
Loss = Callable[..., Tensor]  # (model, tokens, mask) -> a scalar


def fit_model(model: Net, loss: Loss, data: Sequence[Tensor], steps: int, batch: int, lr: float, seed: int) -> Net:
    """Adam with a rate that rises and falls, over batches of rows drawn with a seed; the model, in eval mode."""
    draw = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(steps):
            rows = torch.randint(len(data[0]), (batch,), generator=draw)
            yield tuple(each[rows] for each in data)

    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    fit_steps(optimizer, lambda *parts: loss(model, *parts, generator=draw), batches(), steps, schedule=up_and_down(steps, 20))
    return model.eval()


# One position, a known law


class ToyNet(nn.Module):
    """An MLP on x, the centred log x times tau(t), and t, of positions on their own."""

    def __init__(self, path: GumbelSoftmaxPath, width: int = 128) -> None:
        super().__init__()
        self.path, k = path, path.num_classes
        self.layers = nn.Sequential(nn.Linear(2 * k + EMBEDDING, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, k))

    def forward(self, x: Float[Tensor, "B L K"], t: Float[Tensor, "B"], cond: Any = None) -> Float[Tensor, "B L K"]:
        log_x = safe_log(x)
        warm = (log_x - log_x.mean(-1, keepdim=True)) * self.path.tau(t).to(x)[:, None, None]
        e = time_embedding(t)[:, None].expand(-1, x.shape[1], -1)
        return self.layers(torch.cat([x, warm.clamp(-30, 30), e], dim=-1))


def toy_law(num_classes: int, seed: int, peaked: bool = True) -> Float[Tensor, "K"]:
    """p ~ Dirichlet(1), or the nearly uniform softmax(rand(K)) of Dirichlet flow matching's generator."""
    draw = np.random.default_rng([seed, num_classes])
    law = draw.dirichlet(np.ones(num_classes)) if peaked else np.exp(draw.random(num_classes))
    return torch.from_numpy(law / law.sum())


def divergence(tokens: Int[Tensor, "B L"], law: Float[Tensor, "K"]) -> float:
    """KL(drawn || law) in nats a position, of the letters' frequencies."""
    shares = torch.bincount(tokens.flatten(), minlength=len(law)).double() / tokens.numel()
    kept = shares > 0
    return float((shares[kept] * (shares[kept] / law[kept]).log()).sum())


def exact_model(path: GumbelSoftmaxPath, law: Float[Tensor, "K"]) -> Model:
    """The exact posterior as a model: its logits."""
    return lambda x, t, cond=None: path.posterior(x, law, float(t[0])).clamp_min(1e-30).log()


# Peptides, or a user's two classes


@dataclass(frozen=True, eq=False)
class Designs:
    """Sequences of two classes: a background that a generator learns, and what it is guided to.

    Attributes:
        letters: the alphabet.
        train, test: (sequences, labels: 1 is wanted); no sequence of one is nearer than 80 % identity to one of the other.
        steps: of the generator and of the guide.
        width: of both networks.
    """

    letters: str
    train: tuple[list[str], np.ndarray]
    test: tuple[list[str], np.ndarray]
    steps: tuple[int, int]
    width: int

    def of(self, label: int) -> list[str]:
        """The training sequences of a class."""
        return [sequence for sequence, each in zip(*self.train, strict=True) if each == label]

    @cached_property
    def path(self) -> GumbelSoftmaxPath:
        return GumbelSoftmaxPath(len(self.letters))

    def generator(self, seed: int) -> SequenceCNN:
        """Learns only the background; made once a seed."""
        return self._made("generator", seed, lambda: fit_generator(self.of(0), self.letters, self.steps[0], self.width, seed))

    def guide(self, seed: int) -> SequenceCNN:
        """Tells the classes apart, learned on clean one-hots; made once a seed."""
        return self._made("guide", seed, lambda: fit_guide(self.of(0), self.of(1), self.letters, self.steps[1], self.width, seed))

    @cached_property
    def judge(self) -> Judge:
        """Independent of the guide: another kind of model on other features."""
        return Judge(self.letters).fit(*self.train)

    def masks(self, count: int, seed: int) -> Tensor:
        """Real positions of `count` designs."""
        return drawn_masks(self.of(0), count, seed)

    def _made(self, name: str, seed: int, train: Callable[[], SequenceCNN]) -> SequenceCNN:
        said = hashlib.sha256("\n".join([*self.train[0], *map(str, self.train[1])]).encode()).hexdigest()
        what = {"version": VERSION, "seed": seed, "steps": self.steps, "width": self.width, "data": said}
        folder = folder_of("sequence-networks", name, what)
        with one_thread():
            return SequenceCNN.load(made_once(folder, lambda part: train().save(part / WEIGHTS, overwrite=True)) / WEIGHTS)


def drawn_masks(sequences: Sequence[str], count: int, seed: int) -> Tensor:
    """Real positions of `count` designs, [count, longest], their lengths drawn from those of sequences."""
    draw, lengths = torch.Generator().manual_seed(seed), torch.tensor([len(each) for each in sequences])
    return torch.arange(int(lengths.max())) < lengths[torch.randint(len(lengths), (count,), generator=draw)][:, None]


def seeded(seed: int, **sizes: Any) -> SequenceCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceCNN(**sizes)


def fit_generator(sequences: Sequence[str], letters: str, steps: int, width: int, seed: int) -> SequenceCNN:
    """A flow's model of sequences."""
    net, path = seeded(seed, num_classes=len(letters), width=width), GumbelSoftmaxPath(len(letters))

    def loss(model: Model, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        return gumbel_flow_loss(model, path, tokens, mask, generator=generator)

    return fit_model(net, loss, encoded(sequences, letters), steps, 64, 3e-3, seed)


def fit_guide(others: Sequence[str], wanted: Sequence[str], letters: str, steps: int, width: int, seed: int) -> SequenceCNN:
    """A classifier of clean one-hots with a single logit, above 0 for wanted ones."""
    net, rows = seeded(seed, num_classes=len(letters), width=width, outputs=1), [*others, *wanted]
    tokens, mask = encoded(rows, letters)
    labels = torch.tensor([0.0] * len(others) + [1.0] * len(wanted))

    def loss(model: Model, x: Tensor, y: Tensor, generator: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], y)

    return fit_model(net, loss, (one_hots(tokens, mask, len(letters)), labels), steps, 64, 3e-3, seed)


class Judge:
    """A random forest on composition, charge and length; it sees no convolution and no gradient."""

    def __init__(self, letters: str) -> None:
        from sklearn.ensemble import RandomForestClassifier

        self.letters, self.forest = letters, RandomForestClassifier(200, random_state=0, n_jobs=1)

    def features(self, sequences: Sequence[str]) -> np.ndarray:
        shares = composition(sequences, self.letters)
        charge = [sum(s.count(letter) for letter in "KR") - sum(s.count(letter) for letter in "DE") for s in sequences]
        return np.column_stack([shares, charge, [len(s) for s in sequences]])

    def fit(self, sequences: Sequence[str], labels: np.ndarray) -> Judge:
        self.forest.fit(self.features(sequences), labels)
        return self

    def says(self, sequences: Sequence[str]) -> np.ndarray:
        """1 where a sequence is judged to be of the wanted class."""
        return self.forest.predict(self.features(sequences))


def peptides(full: bool = False) -> Designs:
    """Peptides of 8 to 30 letters (full: 50), towards antimicrobial ones."""
    longest, steps, width = (50, (3000, 1000), 64) if full else (30, (400, 300), 48)
    kept = [row for row in load_peptides() if 8 <= len(row[0]) <= longest]
    return designs_of(kept, ALPHABETS["protein"], steps, width)


def of_fasta(file: str | Path, full: bool = False) -> Designs:
    """A user's sequences: headers say label=1 (wanted) or label=0 (the background)."""
    letters = alphabet_of(file)
    rows = []
    for number, (header, sequence) in enumerate(read_fasta(file, letters), 1):
        said = re.search(r"\blabel=([01])\b", header)
        if said is None:
            raise UserError(f"{file}, record {number} ({header[:40]}) says no label=0 or label=1; expected one in each header")
        rows.append((sequence, int(said[1])))
    if min(sum(label == each for _, label in rows) for each in (0, 1)) < 20:
        raise UserError(f"{file} has fewer than 20 sequences of a class; expected more of both: label=0 is learned, label=1 is guided to")
    return designs_of(list(dict(rows).items()), letters, (3000, 1000) if full else (400, 300), 64 if full else 48)


def alphabet_of(file: str | Path) -> str:
    """DNA where nothing else stands in the file."""
    found = {letter for _, sequence in read_fasta(file, "".join(map(chr, range(33, 127)))) for letter in sequence}
    return ALPHABETS["dna" if found <= set(ALPHABETS["dna"]) else "protein"]


def designs_of(rows: Sequence[tuple[str, int]], letters: str, steps: tuple[int, int], width: int) -> Designs:
    """Split into a training and a test part (a fifth) along families of more than 80 % identity."""
    family = families([sequence for sequence, _ in rows])
    held_out = np.random.default_rng(0).random(family.max() + 1)[family] < 0.2
    parts = []
    for kept in (~held_out, held_out):
        chosen = [row for row, take in zip(rows, kept.tolist(), strict=True) if take]
        parts.append(([sequence for sequence, _ in chosen], np.array([label for _, label in chosen])))
    return Designs(letters, parts[0], parts[1], steps, width)


# Promoters


def promoters(length: int = 128) -> tuple[Int[Tensor, "N L"], Int[Tensor, "M L"]]:
    """The last bases before the start site: (training, those of chromosome X), each once, none in both."""
    ends = {each.sequence[-length:]: each.chromosome for each in load_promoters() if len(each.sequence) >= length}
    clean = {sequence: chromosome for sequence, chromosome in ends.items() if set(sequence) <= set("ACGT")}
    held_out = [sequence for sequence, chromosome in clean.items() if chromosome == "chrX"]
    rest = [sequence for sequence, chromosome in clean.items() if chromosome != "chrX"]
    return encoded(rest, "ACGT")[0], encoded(held_out, "ACGT")[0]
