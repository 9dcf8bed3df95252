"""The verb `fewer design`: sequences in, a generator trained on them, new sequences out, guided where a classifier is given."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewer.files import whole_file


class Alphabet(StrEnum):
    dna = "dna"
    protein = "protein"


def design(
    train: Annotated[Path, typer.Argument(help="FASTA: the sequences that the generator learns, of one alphabet.")],
    out: Annotated[Path, typer.Option(help="The FASTA file to write the designs into.")],
    alphabet: Annotated[Alphabet, typer.Option(help="The letters.")] = Alphabet.protein,
    n: Annotated[int, typer.Option(min=1, max=1_000_000, help="Designs.")] = 1000,
    guide: Annotated[Path | None, typer.Option(help="A classifier of clean sequences that SequenceCNN.save wrote.")] = None,
    towards: Annotated[
        Path | None, typer.Option(help="FASTA: sequences of the wanted kind; a classifier is trained to tell them from the others.")
    ] = None,
    target: Annotated[int, typer.Option(min=0, max=10_000, help="The guide's class to be guided to (of a single logit: 1 or 0).")] = 1,
    gamma: Annotated[float, typer.Option(min=0, max=100, help="Strength of the guidance; 1 and more swamps the generator.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Steps of sampling.")] = 100,
    train_steps: Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps of training.")] = 1000,
    width: Annotated[int, typer.Option(min=1, max=4096, help="Channels of the networks.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of weights, batches and designs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Design sequences by Gumbel-Softmax flow matching; with a guide towards what it looks for. Lengths are drawn from the data's.

    Example: fewer design background.fasta --towards antimicrobial.fasta --n 1000 --out designs.fasta
    """
    if guide is not None and towards is not None:
        raise typer.BadParameter("a guide and sequences to train one were both given; expected one of them", param_hint="--towards")
    if gamma != gamma or gamma == float("inf"):
        raise typer.BadParameter(f"{gamma}; expected a finite number", param_hint="--gamma")
    inputs = [each for each in (train, guide, towards) if each is not None]
    with whole_file(out, overwrite, inputs=inputs) as part:
        import torch

        from fewer.diffusion.gumbel_flow import GumbelSoftmaxPath, SequenceCNN, STGuidance, sample
        from fewer.diffusion.gumbel_flow.problems import drawn_masks, fit_generator, fit_guide
        from fewer.inputs import read_fasta
        from fewer.tasks.sequences import ALPHABETS, decoded

        letters = ALPHABETS[alphabet.value]
        sequences = [sequence for _, sequence in read_fasta(train, letters)]
        path = GumbelSoftmaxPath(len(letters))
        net = fit_generator(sequences, letters, train_steps, width, seed)
        classifier = SequenceCNN.load(guide) if guide is not None else None
        if classifier is not None and (classifier.config["num_classes"] != len(letters) or classifier.config["outputs"] is None):
            raise ValueError(f"{guide} is no classifier of {len(letters)} letters; expected one built with outputs, for this alphabet")
        if towards is not None:
            wanted = [sequence for _, sequence in read_fasta(towards, letters)]
            classifier = fit_guide(sequences, wanted, letters, train_steps, width, seed)
        mask, draw = drawn_masks(sequences, n, seed), torch.Generator().manual_seed(seed)
        rows = []
        for real in mask.split(500):
            towards_it = None if classifier is None else STGuidance(classifier, target, gamma, generator=draw)
            made = sample(net, path, mask.shape[1], len(real), steps, guidance=towards_it, generator=draw, mask=real)
            rows += decoded(made.tokens, real, letters)
        part.write_text("".join(f">design_{i}\n{row}\n" for i, row in enumerate(rows, 1)), encoding="utf8")
    if as_json:
        print(json.dumps({"out": str(out), "designs": n, "guided": classifier is not None, "trained_on": len(sequences)}))
        return
    print(f"{n} designs{' towards the guide' if classifier is not None else ''} from {len(sequences)} sequences, written to {out}")


COMMANDS = {"design": design}
