"""SFPrompt beside full fine-tuning and split training: accuracy, bytes by message, and what a device computes.

At quick scale a small vision transformer that knows Fashion-MNIST is fine-tuned to mirrored images by 20 clients (Dirichlet 0.5), 8 a round.
They hold 60 images on average, below the break-even of 71 sent ones: with more than that SFPrompt sends more than what it replaces. The
tail's last block computes the class token's output alone, which full fine-tuning by transformers does not; that is in the FLOPs as well.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from fewer.devices import one_thread
from fewer.federated._shared.baselines import FedAvg
from fewer.federated._shared.clients import Shards, client_rng
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_records import flat_record
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.partition import dirichlet
from fewer.federated._shared.problems import DATA_HELP, Size, shards_of
from fewer.federated._shared.sampling import FixedSize
from fewer.federated._shared.simulate import Round, simulate
from fewer.federated._shared.traffic import BYTES_A_NUMBER, record_bytes
from fewer.federated.sfprompt.algorithm import SFPrompt, SFPromptConfig
from fewer.federated.sfprompt.cost import wire_cost
from fewer.federated.sfprompt.problems import FULL_HELD, FULL_IMAGES, HELD, Mirrored, mirrored, own_model, whole
from fewer.federated.sfprompt.split_model import SplitModel, split_vit
from fewer.federated.sfprompt.wire import BodyServer, Wire
from fewer.meters import count_flops
from fewer.study import Curve, Figure, LogUniform, NotTestable, Results, Scale, Study, Trial
from fewer.tasks import accuracy

LAST, EVERY, UNLIKE, FEWEST, CLIP = 5, 5, 0.5, 10, 1.0
FULL_EPOCHS = 2  # of full fine-tuning
SIZES = {
    Scale.QUICK: Size(1_200, 1_000, 1_000, clients=20, rounds=20, batch_size=30, side=28, fraction=0.4),
    Scale.FULL: Size(FULL_IMAGES, 1_000, 1_000, clients=50, rounds=100, batch_size=32, side=32, fraction=0.1),
}
CLIENT_SIZES = (10, 20, 40, 60, 100, 150, 200, 300)  # for the break-even curve

study = Study(
    "sfprompt",
    question="What do prompt and tail cost on the wire, on the device, and in accuracy, where the body lies with the server?",
    baseline="full",
    figures=[
        Figure("accuracy", f"test accuracy, mean of the last {LAST} rounds", "%", "higher"),
        Figure("bytes", "bytes both ways, all clients and rounds", "bytes"),
        Figure("prompt_tuning_bytes", "bytes of federated prompt tuning, on devices that hold the whole model", "bytes"),
        Figure("of_formula", "bytes counted over the formula's", ""),
        Figure("flops", "a client's FLOPs a round", ""),
        Figure("server_flops", "the server's FLOPs for a client and round", ""),
        Figure("parameters", "numbers that a device holds", ""),
        Figure("cpu_seconds", "processor time of all rounds, clients and server", "s"),
    ],
    charts=[
        Curve("accuracy", over="round", title="Test accuracy over rounds"),
        Curve("accuracy", over="round", x="bytes", title="Test accuracy over bytes both ways"),
        Curve("client_bytes", over="examples", title="Bytes of a client and round over its examples: the break-even"),
    ],
    time_limit=24 * 3600,
    jobs=2,
)
study.option("data", "fashion-mnist", help=DATA_HELP)
study.option("model", "", help="--full: a transformers directory of a vision transformer")
study.option("score", "after", choices=["after", "before"], help="whether examples are scored after phase 1 or before it")


@study.task
def task(scale: Scale, data: str, model: str) -> Mirrored:
    """The model and the images; the small backbone is trained once on a machine."""
    return own_model(model, data) if model else mirrored(data, FULL_HELD if scale is Scale.FULL else HELD)


def federation(task: Mirrored, trial: Trial) -> Shards:
    size = SIZES[trial.scale]
    split = partial(dirichlet, alpha=UNLIKE, seed=trial.seed, min_size=FEWEST)
    shards, words = shards_of(task, split, size.clients, how=f"Dirichlet {UNLIKE}", fewest=FEWEST, device=trial.device)  # pyright: ignore[reportArgumentType] - has what is asked for
    sizes = [len(part) for part in shards.parts]
    trial.note("clients", f"{words}; {min(sizes)} to {max(sizes)} images")
    return shards


class MeteredServer(BodyServer):
    """The body, and the FLOPs of its passes where they are counted."""

    flops = 0

    def forward_all(self, *arguments: Any, **keywords: Any) -> Any:
        with count_flops() as counted:
            found = super().forward_all(*arguments, **keywords)
        self.flops += counted.total
        return found

    def backward_all(self, *arguments: Any) -> Any:
        with count_flops() as counted:
            found = super().backward_all(*arguments)
        self.flops += counted.total
        return found


def flops_of(algorithm: Any, flat: FlatModel, shards: Shards, seed: int) -> int:
    """All FLOPs of the round of the client whose size is the median."""
    client = int(np.argsort([len(part) for part in shards.parts], kind="stable")[len(shards) // 2])
    message = algorithm.configure(algorithm.initial(flat.initial(), len(shards)), [client], 1)[0]
    with torch.no_grad(), count_flops() as counted:
        algorithm.local({}, message, shards.shard(client, flat), client_rng(seed, 1, client))
    return counted.total


def follow(trial: Trial, algorithm: Any, flat: FlatModel, judge: Any, shards: Shards, judged: Any, bytes_so_far: Any) -> float:
    """One run of an arm: its course, and the last rounds' mean accuracy."""
    rounds, last, so_far = SIZES[trial.scale].rounds, deque[float](maxlen=LAST), {"cpu_seconds": 0.0}

    def load(x: Tensor) -> None:
        judge.load_state_dict(flat.named(x), strict=False)

    def tell(line: Round) -> None:
        so_far["cpu_seconds"] += line.cpu_seconds
        spent = bytes_so_far(line)
        if line.round % EVERY and line.round <= rounds - LAST:
            return
        last.append(accuracy(judge, judged))
        if not trial.tuning:
            trial.log("accuracy", last[-1], round=line.round)
            trial.log("bytes", spent, round=line.round)
        trial.progress(line.round, rounds, f"{100 * last[-1]:.1f} %")

    sampler = FixedSize(SIZES[trial.scale].fraction)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"client \d+ sends \d+ examples a round")  # a few clients of many images; the curve says it
        simulate(algorithm, flat, shards, rounds, sampler=sampler, seed=trial.seed, evaluate=load, tell=tell)
    if not trial.tuning:
        trial.log("cpu_seconds", so_far["cpu_seconds"])
    return float(np.mean(last))


def run_full(task: Mirrored, trial: Trial) -> None:
    """Full fine-tuning: FedAvg on the whole model."""
    with one_thread():
        shards, size = federation(task, trial), SIZES[trial.scale]
        model = whole(task).to(trial.device)
        config = LocalConfig(
            local_epochs=FULL_EPOCHS, batch_size=size.batch_size, lr=trial.settings["lr"], lr_decay=1.0, weight_decay=0.0,
            max_grad_norm=CLIP, weighted=True,
        )  # fmt: skip
        algorithm, flat = FedAvg(config), FlatModel(model)
        one_way = record_bytes(RecordDict({"model": flat_record(flat.initial().cpu())}))
        spent = [0.0]

        def bytes_so_far(line: Round) -> float:
            spent[0] += 2 * one_way * len(line.clients)
            return spent[0]

        found = follow(trial, algorithm, flat, model, shards, judged_of(task, trial), bytes_so_far)
        if trial.tuning:
            return trial.objective(found)
        for examples in CLIENT_SIZES:
            trial.log("client_bytes", 2.0 * BYTES_A_NUMBER * flat.size, examples=examples)
        log_all(
            trial, {"accuracy": found, "bytes": spent[0], "parameters": flat.size, "flops": flops_of(algorithm, flat, shards, trial.seed)}
        )


def run_split(task: Mirrored, trial: Trial, **variant: Any) -> None:
    """SFPrompt, a variant of it, or split federated learning, which is its case without phase 1 and pruning."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        shards, size = federation(task, trial), SIZES[trial.scale]
        torch.manual_seed(trial.seed)
        split = split_vit(task.model).to(trial.device)
        config = SFPromptConfig(
            **({"score": trial.settings["score"]} | variant), batch_size=size.batch_size, lr=trial.settings["lr"], max_grad_norm=CLIP
        )
        wire = Wire(split.server())
        algorithm, flat, rounds = SFPrompt(config, wire), FlatModel(split.client()), []

        def bytes_so_far(line: Round) -> float:
            rounds.append(line.clients)
            return float(sum(wire.bytes.values()))

        found = follow(trial, algorithm, flat, split, shards, judged_of(task, trial), bytes_so_far)
        if trial.tuning:
            return trial.objective(found)
        told(trial, split, config, shards, rounds, wire)
        server = MeteredServer(split.body, shape=split.cut_shape)
        flops = flops_of(SFPrompt(config, Wire(server)), flat, shards, trial.seed)
        held = sum(parameter.numel() for parameter in split.client().parameters())
        log_all(trial, {"accuracy": found, "parameters": held, "flops": flops - server.flops, "server_flops": server.flops})


def told(trial: Trial, split: SplitModel, config: SFPromptConfig, shards: Shards, rounds: Sequence[Sequence[int]], wire: Wire) -> None:
    """What travelled: by message, beside the formula, beside federated prompt tuning, and for clients of other sizes."""
    costs = [
        wire_cost(split, len(shards.parts[client]), config.keep, split_epochs=config.split_epochs, batch_size=config.batch_size)
        for clients in rounds
        for client in clients
    ]
    counted = float(sum(wire.bytes.values()))
    tuning = sum(wire.bytes[kind] for kind in ("model_down", "model_up"))
    log_all(trial, {"bytes": counted, "prompt_tuning_bytes": tuning, "of_formula": counted / sum(cost.bytes for cost in costs)})
    for kind, spent in Counter(wire.bytes).items():
        trial.log("message_bytes", spent, message=kind)
    for examples in CLIENT_SIZES:
        trial.log("client_bytes", wire_cost(split, examples, config.keep, batch_size=config.batch_size).bytes, examples=examples)
    trial.note("break-even", f"{costs[0].break_even} sent examples a client and round")


def judged_of(task: Mirrored, trial: Trial) -> Any:
    return tuple(part.to(trial.device) for part in (task.validation if trial.tuning else task.test))


def log_all(trial: Trial, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        trial.log(name, float(value))


def rates(start: float) -> dict[str, LogUniform]:
    """One grid for all arms; where each begins was found by a few tries."""
    return {"lr": LogUniform(0.01, 1.0, start=start)}


study.arm_table(run_full, {"full": {"label": "full fine-tuning", "space": rates(0.05)}})
study.arm_table(
    run_split,
    {
        "splitfed": {"label": "SplitFed, prompt and tail", "keep": 1.0, "shortcut_epochs": 0},
        "sfprompt": {"label": "SFPrompt"},
        "random": {"label": "SFPrompt, random pruning", "select": "random"},
        "no-phase-1": {"label": "SFPrompt without phase 1", "shortcut_epochs": 0},
    },
    space=rates(0.2),
)


# What the paper claims


@study.claim(
    "SFPrompt moves at most 0.6 of full fine-tuning's bytes, with clients below the break-even, and within 2 % of the formula",
    paper="0.47 of full fine-tuning (ViT-base), 0.19 (ViT-large)",
    if_fails="clients hold more images than the break-even allows for",
)
def fewer_bytes(results: Results) -> Any:
    return (results.ratio("bytes", "sfprompt", "full") <= 0.6) & results.mean("of_formula", "sfprompt").between(0.98, 1.02)


@study.claim(
    "A client computes at most half of full fine-tuning's FLOPs",
    paper="0.46 % of full fine-tuning's local computing (12 or 24 wide blocks)",
    if_fails="head and tail are a third of so small a model, the prompt's tokens lengthen every pass by a fourth, and examples are scored as well",
)
def less_computing(results: Results) -> Any:
    return results.ratio("flops", "sfprompt", "full") <= 0.5


@study.claim(
    "SFPrompt's accuracy is within 3 points of full fine-tuning's",
    paper="competitive with full fine-tuning (abstract; the tables were not read)",
    if_fails="prompt and tail of so small a model cannot learn what all of it can, and the backbone knows little else than the images as they are",
)
def as_accurate(results: Results) -> Any:
    return results.difference("accuracy", "sfprompt", "full") >= -0.03


@study.claim(
    "Phase 1 gives at least 2 points of accuracy",
    paper="phase 1, the local-loss update, makes up for fewer exchanges (no figure was read)",
    if_fails="what is learnt by the shortcut is of no use to the whole",
)
def phase_1_helps(results: Results) -> Any:
    return results.difference("accuracy", "sfprompt", "no-phase-1") >= 0.02


@study.claim(
    "Keeping the examples of the largest error is at least as good as random ones",
    paper="EL2N keeps the examples that teach most (no figure was read)",
    if_fails="the shortcut's hardest examples are often those that no model of this size gets right, and random ones show the classes as they are",
)
def hard_examples(results: Results) -> Any:
    return results.difference("accuracy", "sfprompt", "random") >= 0


@study.claim("A client computes 0.46 % of what full fine-tuning takes", paper="0.46 % (ViT with 12 or 24 blocks, ImageNet-21k backbones)")
def far_less_computing(results: Results) -> Any:
    raise NotTestable(
        "here 2 of 6 narrow blocks are passed through, there 1 or 2 of 12 or 24 wide ones; --full runs a user's own transformer"
    )


@study.summary
def summary(results: Results) -> str:
    def said(arm: str) -> str:
        return results.say("accuracy", arm)

    return (
        f"On this machine SFPrompt ended at {said('sfprompt')}, with random examples in place of hard ones at {said('random')}, without phase 1 at "
        f"{said('no-phase-1')}; split training of all examples at {said('splitfed')}, full fine-tuning at {said('full')}, and after about as many "
        f"bytes as SFPrompt moved at {at_equal_bytes(results)}. SFPrompt moved {results.say('bytes', 'sfprompt')}, SplitFed "
        f"{results.say('bytes', 'splitfed')}, full fine-tuning {results.say('bytes', 'full')}; federated prompt tuning, on devices that hold the "
        f"whole model, would have moved {results.say('prompt_tuning_bytes', 'sfprompt')}. A device held {results.say('parameters', 'sfprompt')} "
        f"numbers in place of {results.say('parameters', 'full')}. The curve over a client's examples says from where on full fine-tuning moves less."
    )


def at_equal_bytes(results: Results) -> str:
    """Full fine-tuning's accuracy when it had moved what SFPrompt moved in all, between two looks at it."""
    spent, right = (
        {int(dict(at)["round"]): list(by_seed.values()) for at, by_seed in results.curve(name, "full").items() if dict(at).get("round")}
        for name in ("bytes", "accuracy")
    )
    if not spent or not right:
        return "an accuracy that was not looked at"
    rounds, limit = sorted(spent), results.mean("bytes", "sfprompt").value
    at = float(np.interp(limit, [np.mean(spent[each]) for each in rounds], [np.mean(right[each]) for each in rounds]))
    return f"{100 * at:.1f} %" if math.isfinite(at) else "no figure"
