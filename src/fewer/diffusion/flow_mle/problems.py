"""What is learnt: people's handwriting as a policy's motions, digits or a user's own images, fields trained once a seed; a robot that picks and places."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.data import WEIGHTS, folder_of, load_handwriting, made_once
from fewer.diffusion.flow_mle.contraction import ContractingResidual
from fewer.diffusion.flow_mle.finetuning import FineTuneConfig, finetune, latents_of
from fewer.diffusion.flow_mle.policy import FlowPolicy
from fewer.diffusion.flow_mle.solver import flow_matching_loss
from fewer.diffusion.flow_mle.velocity import VelocityMLP
from fewer.errors import MissingExtra
from fewer.fitting import MovingAverage, fit_steps
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser
from fewer.tasks.digits_diffusion import digit_images
from fewer.tasks.image_judges import read_own_images, split_fifth

VERSION = 1  # of what is trained: raise it when the code makes another network from the same settings
POINTS, MILLIMETRES, DEMONSTRATIONS = 33, 50.0, 5  # of a motion, of a unit, for training
Data = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Training:
    """How a base field is trained: flow matching by Adam, weights averaged."""

    updates: int
    batch: int
    lr: float
    ema: float


class ImageField(nn.Module):
    """v(t, x) of images of any shape: the digits' denoiser without its preconditioning, zeros after the pixels up to a square."""

    def __init__(self, shape: tuple[int, ...], width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.side = math.isqrt(math.prod(shape) - 1) + 1
        self.body = DigitDenoiser(DenoiserRecipe(side=self.side, width=width, blocks=blocks))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        rows = x.flatten(1)
        framed = nn.functional.pad(rows, (0, self.side**2 - rows.shape[1]))
        return self.body.network(framed, 2 * t - 1, None)[:, : rows.shape[1]].reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Problem:
    """Data to learn, others to judge by, and fields for them.

    Attributes:
        train, test: (x1, condition or None).
        make, make_residual: a field, and one of fewer parameters whose last layer is zero, of the weights that torch's seed says.
        training: of the field.
        latents: RK4 steps of the inversion.
    """

    name: str
    train: Data
    test: Data
    make: Callable[[], nn.Module]
    make_residual: Callable[[], nn.Module]
    training: Training
    latents: int

    @cached_property
    def digest(self) -> str:
        given = [each.numpy() for each in self.train if each is not None]
        return hashlib.sha256(b"".join(str(each.shape).encode() + each.tobytes() for each in given)).hexdigest()

    def kept(self, seed: int, device: str = "cpu") -> tuple[nn.Module, Tensor]:
        """The field of a seed and the latents of the training data under it, made once on a machine."""
        what = {"version": VERSION, "data": self.digest, "training": asdict(self.training), "latents": self.latents}
        what |= {"field": str(self.seeded(self.make, seed)), "seed": seed}

        def make(folder: Path) -> None:
            from safetensors.torch import save_file

            field = self.seeded(self.make, seed).to(device)
            field = fit_flow(field, self.on(device), self.training, seed)
            x1, cond = self.on(device)
            weights = {name: value.cpu().contiguous() for name, value in field.state_dict().items()}
            save_file({**weights, "latents": latents_of(field, x1, cond, self.latents).cpu().contiguous()}, folder / WEIGHTS)

        from safetensors.torch import load_file

        read = load_file(made_once(folder_of("flow-fields", self.name, what), make) / WEIGHTS)
        latents, field = read.pop("latents"), self.seeded(self.make, seed)
        field.load_state_dict(read)
        return field.to(device).eval(), latents.to(device)

    def seeded(self, make: Callable[[], nn.Module], seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    def on(self, device: str, test: bool = False) -> Data:
        x1, cond = self.test if test else self.train
        return x1.to(device), None if cond is None else cond.to(device)


def fit_flow(field: nn.Module, data: Data, training: Training, seed: int) -> nn.Module:
    """A field trained (further) by flow matching: the average of its weights."""
    (x1, cond), average = data, MovingAverage(field, training.ema)
    draw = torch.Generator(x1.device).manual_seed(seed)
    how: dict[str, Any] = {"generator": draw, "device": x1.device}

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(training.updates):
            rows = torch.randint(len(x1), (training.batch,), **how)
            given = (torch.randn(x1[rows].shape, **how), x1[rows], torch.rand(training.batch, **how))
            yield given if cond is None else (*given, cond[rows])

    optimizer = torch.optim.Adam(field.parameters(), lr=training.lr, fused=True)
    fit_steps(
        optimizer,
        lambda *pairs: flow_matching_loss(field, *pairs),
        batches(),
        training.updates,
        tell=lambda update, loss: average.update(field),
    )
    return average.model


def motions(full: bool = False) -> Problem:
    """Handwriting: 32 points of a motion from its first point and its kind; the last two demonstrations of each kind are held out."""
    found = load_handwriting()
    at = np.linspace(0, 999, POINTS).round().astype(int)
    points = torch.from_numpy(np.stack([each[:, at] for each in found.values()]) / MILLIMETRES).float()  # [30, 7, 33, 2]
    kinds = torch.eye(len(points))[:, None].expand(-1, points.shape[1], -1)
    x1, cond = points[:, :, 1:].flatten(2), torch.cat([points[:, :, 0], kinds], dim=2)
    parts = [(x1[:, of].flatten(0, 1), cond[:, of].flatten(0, 1)) for of in (slice(DEMONSTRATIONS), slice(DEMONSTRATIONS, None))]
    dim, cond_dim = x1.shape[2], cond.shape[2]
    return Problem(
        "motions",
        parts[0],
        parts[1],
        lambda: VelocityMLP(dim, cond_dim, 128),
        lambda: VelocityMLP(dim, cond_dim, 84, residual=True),
        Training(15_000 if full else 1500, 128, 2e-3, 0.99),
        40,
    )


def contracting(problem: Problem) -> ContractingResidual:
    """The contracting residual of a problem with a condition, its gate closed."""
    x1, cond = problem.train
    return ContractingResidual(x1.shape[1], 64, 1.0, 0 if cond is None else cond.shape[1], gate=0.0)


def images(data: str = "", full: bool = False) -> Problem:
    """Digits, or a user's own images.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be used.
    """
    if data:
        train, test = split_fifth(read_own_images(data))
    else:
        train, test = (digit_images("mnist28" if full else "digits8", split)[0] for split in ("train", "test"))
    shape, width = tuple(train.shape[1:]), 512 if full else 256
    return Problem(
        "images",
        (train, None),
        (test, None),
        lambda: ImageField(shape, width),
        lambda: ImageField(shape, 3 * width // 8, 2),
        Training(30_000 if full else 1500, 256, 2e-3, 0.995),
        20,
    )


# Manipulation: a robot's arm that picks and places, in MuJoCo; its packages do not come with the extra

EPISODE, STATE = 50, 28  # steps; numbers of a state: 25 of the robot and the object, 3 of the goal
HOVER, NEAR, GAIN, CLOSING = 0.06, 0.01, 6.0, 4  # metres above the object, metres that count as there, of the pull, steps of the fingers
DISTURBED = {"none": {}, "action": {"action_noise": 0.1}, "observation": {"observation_noise": 0.005}}  # of [-1, 1]; metres
REACHED, PRECISE = 0.05, 0.01  # metres to the goal: success as the environment has it, and strictly


def pick_and_place() -> Any:
    """The environment FetchPickAndPlace-v4; MissingExtra says what it needs."""
    if any(importlib.util.find_spec(name) is None for name in ("gymnasium_robotics", "mujoco")):
        raise MissingExtra("the robot's arm is not installed; install it with: pip install gymnasium-robotics==1.4.2 mujoco==3.3.7")
    gymnasium = importlib.import_module("gymnasium")
    gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    return gymnasium.make("FetchPickAndPlace-v4", max_episode_steps=EPISODE)


class Expert:
    """Picks and places by its script: above the object, down to it, fingers closed, off to the goal. Called as a `FlowPolicy` is."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.phase, self.held = "hover", 0

    def act(self, state: Float[Tensor, "28"], generator: torch.Generator | None = None) -> Float[Tensor, "4"]:
        gripper, thing, goal = state[:3], state[3:6], state[25:]
        above = thing + torch.tensor([0.0, 0.0, HOVER])
        if self.phase == "hover" and bool((above - gripper).norm() < NEAR):
            self.phase = "descend"
        if self.phase == "descend" and bool((thing - gripper).norm() < NEAR):
            self.phase = "close"
        if self.phase == "close" and self.held == CLOSING:
            self.phase = "carry"
        self.held += self.phase == "close"
        way = {"hover": above - gripper, "descend": thing - gripper, "close": torch.zeros(3), "carry": goal - thing}[self.phase]
        fingers = 1.0 if self.phase in ("hover", "descend") else -1.0
        return torch.cat([GAIN * way, torch.tensor([fingers])]).clamp(-1, 1)


class Episode(NamedTuple):
    states: Float[Tensor, "50 28"]
    actions: Float[Tensor, "50 4"]
    distance: float  # of the object to the goal at the end, in metres
    seconds: float  # that the actor took


def episode(env: Any, actor: Any, seed: int, action_noise: float = 0.0, observation_noise: float = 0.0) -> Episode:
    """One episode; where it begins, the actor's noise and the normal noises are drawn from the seed.

    Args:
        action_noise: deviation, of actions in [-1, 1].
        observation_noise: deviation in metres, of where the gripper and the object are seen; other numbers of a state are no lengths.
    """
    draw, noise = (torch.Generator().manual_seed(seed + i) for i in (0, 1))
    states, actions, seconds = [], [], 0.0
    actor.reset()
    seen, _ = env.reset(seed=seed)
    for _ in range(EPISODE):
        states.append(torch.from_numpy(np.concatenate([seen["observation"], seen["desired_goal"]])).float())
        given, off = states[-1].clone(), observation_noise * torch.randn(2, 3, generator=noise)
        given[:9] += torch.cat([off[0], off[1], off[1] - off[0]])  # of the gripper, the object, and between them
        started = time.perf_counter()
        actions.append(actor.act(given, draw))
        seconds += time.perf_counter() - started
        done = actions[-1] + action_noise * torch.randn(4, generator=noise)
        seen, *_ = env.step(done.clamp(-1, 1).numpy())
    distance = float(np.linalg.norm(seen["achieved_goal"] - seen["desired_goal"]))
    return Episode(torch.stack(states), torch.stack(actions), distance, seconds)


def episode_seed(seed: int, i: int, test: bool) -> int:
    """Even numbers to learn from, odd ones to be judged by: no episode is both."""
    return 2 * (100_000 * seed + i) + test


def demonstrations(
    env: Any, count: int = 100, seed: int = 0, horizon: int = 8, obs_steps: int = 2
) -> tuple[Float[Tensor, "N obs_steps 28"], Float[Tensor, "N horizon 4"]]:
    """The expert's episodes as windows of states and the chunks of actions that followed, for `FlowPolicy.fit`."""
    seen, taken = [], []
    for i in range(count):
        run = episode(env, Expert(), episode_seed(seed, i, test=False))
        led = torch.cat([run.states[:1].expand(obs_steps - 1, -1), run.states])  # the first stands for those before it
        seen.append(led.unfold(0, obs_steps, 1).mT[: EPISODE - horizon + 1])
        taken.append(run.actions.unfold(0, horizon, 1).mT)
    return torch.cat(seen), torch.cat(taken)


def judged(env: Any, actor: Any, count: int = 50, seed: int = 0, **noises: float) -> dict[str, float]:
    """How an actor does in episodes that no demonstration began as; noises as `episode` takes them."""
    runs = [episode(env, actor, episode_seed(seed, i, test=True), **noises) for i in range(count)]
    far = np.array([run.distance for run in runs])
    milliseconds = 1e3 * sum(run.seconds for run in runs) / (count * EPISODE)
    shares = {"success": float((far < REACHED).mean()), "precise": float((far < PRECISE).mean())}
    return shares | {"distance": float(np.median(far)), "milliseconds": milliseconds}


@dataclass(frozen=True, eq=False)
class Robot:
    """A robot's arm to be taught.

    Attributes:
        environment: makes where it moves.
        count: demonstrations.
        episodes: that a policy is judged by, on each of two seeds.
        width: of the layers of a policy's field.
        training: of that field.
    """

    environment: Callable[[], Any] = pick_and_place
    count: int = 100
    episodes: int = 50
    width: int = 256
    training: Training = Training(3000, 128, 1e-3, 0.99)

    def shown(self, seed: int) -> tuple[Float[Tensor, "N obs_steps 28"], Float[Tensor, "N horizon 4"]]:
        """The `demonstrations` of a seed, made once on a machine."""
        from safetensors.torch import load_file, save_file

        def make(folder: Path) -> None:
            seen, taken = demonstrations(self.environment(), self.count, seed)
            save_file({"seen": seen.contiguous(), "taken": taken.contiguous()}, folder / WEIGHTS)

        what = {"version": VERSION, "environment": self.environment.__name__, "count": self.count, "seed": seed}
        read = load_file(made_once(folder_of("flow-demonstrations", "arm", what), make) / WEIGHTS)
        return read["seen"], read["taken"]

    def lesson(self, seed: int) -> tuple[Problem, FlowPolicy]:
        """What a seed's demonstrations teach, and a policy with their scales, whose field is still to be put in."""
        policy = FlowPolicy(STATE, 4, width=self.width)
        shown = self.shown(seed)
        policy.take_scales(*shown)
        x1, cond = policy.pairs(*shown)
        dim, cond_dim = x1.shape[1], cond.shape[1]
        problem = Problem(
            "manipulation",
            (x1, cond),
            (x1[:0], cond[:0]),  # it is judged by what it does
            lambda: VelocityMLP(dim, cond_dim, self.width),
            lambda: VelocityMLP(dim, cond_dim, 3 * self.width // 8, residual=True),
            self.training,
            40,
        )
        return problem, policy

    def judged(self, env: Any, policy: FlowPolicy, seed: int, noise: str = "none") -> dict[str, float]:
        """`judged`, the mean over two seeds of a trial's own, with a noise of `DISTURBED`."""
        told = [judged(env, policy, self.episodes, 2 * seed + each, **DISTURBED[noise]) for each in (0, 1)]
        return {figure: sum(each[figure] for each in told) / len(told) for figure in told[0]}


class Regression(nn.Module):
    """v = g(cond) - x, one Euler step of which ends at g(cond) from any noise: its reconstruction's error is a plain regression's."""

    def __init__(self, answer: nn.Module) -> None:
        super().__init__()
        self.answer = answer  # a field, whose clock and noise stay 0

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.answer(torch.zeros_like(t), torch.zeros_like(x), cond) - x


def regressed(problem: Problem, updates: int, seed: int, device: str = "cpu") -> nn.Module:
    """A `Regression` by a problem's own network, trained as its field is, for so many updates."""
    (x1, cond), training = problem.on(device), problem.training
    assert cond is not None
    field = problem.seeded(lambda: Regression(problem.make()), seed).to(device)
    config = FineTuneConfig(updates, training.batch, training.lr, ema=training.ema, seed=seed)
    return finetune(field, (x1, cond), steps=1, pairing="random", config=config).field
