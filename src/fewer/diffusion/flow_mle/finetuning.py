"""Fine-tuning on reconstructions: the loss on the solver's output, what noise each sample is paired with, and the three ways to train."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import field as entry
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_not_negative, check_positive, check_share, check_whole
from fewer.diffusion.flow_mle.contraction import ContractingResidual, along_paths
from fewer.diffusion.flow_mle.solver import INVERSION_STEPS, METHODS, ReconstructionMLE, invert, odeint
from fewer.diffusion.flow_mle.velocity import CONFIG, WEIGHTS, ResidualField, VelocityMLP, as_rows, dtype_of
from fewer.files import made_whole, model_digest, read_json, read_weights
from fewer.fitting import MovingAverage, evaluating, fit_steps

Mode = Literal["full", "residual", "contracting"]
Pairing = Literal["invert", "random", "mixed"]
MODES, PAIRINGS = ("full", "residual", "contracting"), ("invert", "random", "mixed")
RESIDUALS = {"VelocityMLP": VelocityMLP, "ContractingResidual": ContractingResidual}  # that an adapter's file can name
PLAIN_STEPS = 10  # K up to which activations are kept
WIDE_SPREAD = 0.1  # share of the variance that the condition leaves, from which random pairs average modes
CHUNK = 2048  # samples inverted at once


@dataclass(frozen=True)
class FineTuneConfig:
    """How a short run is trained. The paper's rates could not be checked: all numbers are ours.

    Attributes:
        updates: of the weights; 5 to 20 % of the pre-training's.
        lr: of Adam; by default 5e-4 for the whole field (0.1 to 0.3 of the pre-training's), 2e-3 for a residual.
        method: of the solver.
        inversion_steps: of RK4.
        reinvert_every: epochs after which latents are made anew by the averaged field; 0: never.
        width, rate: of the contracting residual; by default rate 1 where there is a condition and 0 without, as no map of noise onto data
            that spread contracts everywhere.
        share: of the base's parameters that a residual may have.
    """

    updates: int = 400
    batch: int = 128
    lr: float | None = None
    clip: float = 1.0
    ema: float = 0.99
    method: str = "euler"
    sigma: Literal["fixed", "learned"] = "fixed"
    fm_weight: float = 0.0
    inversion_steps: int = INVERSION_STEPS
    reinvert_every: int = 0
    width: int = 64
    rate: float | None = None
    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(updates=self.updates, batch=self.batch, inversion_steps=self.inversion_steps, width=self.width)
        check_whole(least=0, reinvert_every=self.reinvert_every, seed=self.seed)
        check_positive(clip=self.clip, share=self.share, **({} if self.lr is None else {"lr": self.lr}))
        check_share(ema=self.ema)
        check_not_negative(rate=0.0 if self.rate is None else self.rate)
        ReconstructionMLE(1, self.method, self.sigma, self.fm_weight)  # refuses its own words now, not after the inversion


@dataclass(frozen=True, eq=False)
class FineTuned:
    """What fine-tuning made.

    Attributes:
        field: the velocity to sample with, in eval mode: the tuned copy, or base and residual.
        adapter: the residual alone; None where the whole field was trained.
        steps: K that it was tuned for.
        method: of the solver.
        report: what there is to know of it, plain numbers and words.
        base: digest of the weights that the adapter belongs to.
    """

    field: nn.Module
    adapter: nn.Module | None
    steps: int
    method: str = "euler"
    report: dict[str, Any] = entry(default_factory=dict)
    base: str = ""

    @torch.no_grad()
    def sample(self, x0: Float[Tensor, "B *shape"], cond: Any = None, steps: int | None = None) -> Float[Tensor, "B *shape"]:
        """Where noises end. Another number of steps than the tuned one is done with a warning: tuning moves the error elsewhere."""
        if steps is not None and steps != self.steps:
            warnings.warn(
                f"sampling takes {steps} steps of a field that was tuned for {self.steps}; expected {self.steps}, as other numbers may be "
                "worse than before the tuning: leave steps out, or tune for that number",
                stacklevel=2,
            )
        with evaluating(self.field):
            return odeint(self.field, x0, self.steps if steps is None else steps, method=self.method, cond=cond)

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """The adapter alone, or the whole field's weights, with K, into a folder, whole or not at all."""
        from safetensors.torch import save_file

        kept = self.field if self.adapter is None else self.adapter
        said = {
            "tuned": "field" if self.adapter is None else "adapter",
            "kind": type(kept).__name__,
            "sizes": getattr(kept, "config", None) if isinstance(kept, tuple(RESIDUALS.values())) else None,
            "base": self.base,
            "steps": self.steps,
            "method": self.method,
            "report": self.report,
        }
        with made_whole(folder, overwrite, option="folder") as part:
            (part / CONFIG).write_text(json.dumps(said, indent=1) + "\n", "utf8")
            save_file({name: value.detach().clone().contiguous() for name, value in kept.state_dict().items()}, part / WEIGHTS)


def load_finetuned(folder: str | Path, base: nn.Module, residual: nn.Module | None = None) -> FineTuned:
    """What `FineTuned.save` wrote, put onto a copy of its base.

    Args:
        base: the field that was fine-tuned, of the same weights for an adapter; it is not changed.
        residual: a module of the adapter's shape, where it is neither a `VelocityMLP` nor a `ContractingResidual`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no folder of this kind, weights that do not fit, or an adapter of another base.
    """
    said = read_json(Path(folder) / CONFIG)
    if not {"tuned", "kind", "sizes", "base", "steps", "method", "report"} <= said.keys() or said["tuned"] not in ("field", "adapter"):
        raise ValueError(f"{folder} is no folder of a fine-tuned field; expected what FineTuned.save writes: save it again")
    check_whole(steps=said["steps"])
    check_choice(METHODS, method=said["method"])
    copied, weights = frozen(base), read_weights(Path(folder) / WEIGHTS)
    if said["tuned"] == "adapter" and said["base"] != (digest := model_digest(base)):
        raise ValueError(
            f"{folder} is an adapter of the base {said['base']}, and this one is {digest}; expected the weights it was trained on"
        )
    if said["tuned"] == "adapter" and residual is None and said["kind"] not in RESIDUALS:
        raise ValueError(f"{folder} is an adapter of the kind {said['kind']}; expected residual=, a module of its shape to load it into")
    try:
        if said["tuned"] == "field":
            kept = copied.requires_grad_(True)
        elif residual is not None:
            kept = copy.deepcopy(residual)
        else:
            kept = RESIDUALS[said["kind"]](**said["sizes"], **{name: weights[name] for name in ("metric",) if name in weights})
        kept = kept.to(next(base.parameters(), torch.empty(0)).device, dtype_of(weights)).eval()
        kept.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder} does not fit this {said['kind']} ({' '.join(str(error).split())[:200]}); expected what was saved: give that field or residual"
        ) from error
    whole = copied if kept is copied else ResidualField(copied, kept).eval()
    return FineTuned(whole, None if kept is copied else kept, said["steps"], said["method"], said["report"], said["base"])


def frozen(base: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients."""
    return copy.deepcopy(base).requires_grad_(False).eval()


def spread(x1: Tensor, cond: Tensor) -> float:
    """The share of x1's variance that a ridge regression on the condition leaves on the training data."""
    x, c = (as_rows(each).double() for each in (x1, cond))
    x, c = x - x.mean(0), c - c.mean(0)
    total = float(x.square().sum())
    penalty = 1e-6 * len(c) * c.square().mean().clamp(min=1e-12) * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    left = x - c @ torch.linalg.solve(c.T @ c + penalty, c.T @ x)
    return float(left.square().sum()) / total if total else 0.0


def latents_of(field: nn.Module, x1: Tensor, cond: Tensor | None, steps: int) -> Tensor:
    """`invert` of all samples, in chunks."""
    parts = zip(x1.split(CHUNK), [None] * len(x1) if cond is None else cond.split(CHUNK), strict=False)
    return torch.cat([invert(field, x, c, steps) for x, c in parts])


def finetune(
    field: nn.Module,
    data: Tensor | tuple[Tensor, Tensor],
    *,
    steps: int,
    mode: Mode = "full",
    pairing: Pairing = "invert",
    mix: float = 0.5,
    force: bool = False,
    latents: Tensor | None = None,
    residual: nn.Module | None = None,
    config: FineTuneConfig | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> FineTuned:
    """Fine-tune a flow-matching field on the reconstructions of its own K-step solver.

    Args:
        field: trained by flow matching (t = 0 noise, t = 1 data), called as `field(t, x)` or `field(t, x, cond)`; not changed. Dropout
            stays off, as the map whose likelihood is raised is the deterministic one of deployment.
        data: x1 [N, ...] scaled to about [-1, 1], or (x1, cond [N, ...]); float32 or float64.
        steps: K of deployment.
        mode: "full" trains a copy of the field; "residual" an added module; "contracting" a `ContractingResidual`.
        pairing: "invert" pairs x1 with its latent under the frozen field, "random" with fresh noise, "mixed" with both. Random pairs
            average modes: they suit conditions that all but name x1. (The pairing is ours; the paper's is not known.)
        mix: share of random pairs when mixed.
        force: let random pairs be taken where nothing says what x1 should be.
        latents: those of x1 where they are known already, as `invert` gives them.
        residual: the module to be added, its last layer zero; by default a `VelocityMLP` of `config.share` of the field's parameters.
        config: how it is trained.
        tell: called with the update and its loss.

    Raises:
        ValueError: data that do not fit or are not finite, random pairs without a condition, unknown words.
        FloatingPointError: a solve diverged, or a loss is not finite.
    """
    config = config or FineTuneConfig()
    check_whole(steps=steps)
    check_choice(MODES, mode=mode)
    check_choice(PAIRINGS, pairing=pairing)
    check_share(mix=mix)
    x1, cond = data if isinstance(data, tuple) else (data, None)
    check_data(x1, cond, latents, field)
    report: dict[str, Any] = {"mode": mode, "pairing": pairing, "steps": steps, "updates": config.updates}
    if pairing != "invert":
        report["spread"] = checked_spread(x1, cond, pairing, force)
    base, trained = frozen(field), residual
    if mode == "full":
        trained = copy.deepcopy(base).requires_grad_(True)
    elif trained is None:
        trained = made_residual(base, x1, cond, mode, config)
    else:
        trained = copy.deepcopy(trained)
    assert trained is not None
    trained.eval()

    def whole(part: nn.Module) -> nn.Module:
        return part if mode == "full" else ResidualField(base, part)

    if pairing == "random":
        latents = None  # though they be known
    else:
        latents = latents_of(base, x1, cond, config.inversion_steps) if latents is None else latents
        report |= latent_figures(latents)
    average, model = MovingAverage(trained, config.ema), whole(trained)
    loss = ReconstructionMLE(steps, config.method, config.sigma, config.fm_weight, checkpoint=steps > PLAIN_STEPS).to(x1)
    draw = torch.Generator(x1.device).manual_seed(config.seed)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        x0s, epoch = latents, 0
        for update in range(config.updates):
            now = update * config.batch // (len(x1) * config.reinvert_every) if config.reinvert_every else 0
            if now > epoch and x0s is not None:
                x0s, epoch = latents_of(whole(average.model), x1, cond, config.inversion_steps), now
            rows = torch.randint(len(x1), (config.batch,), generator=draw, device=x1.device)
            x0 = noise_for(x1[rows], None if x0s is None else x0s[rows], mix if pairing == "mixed" else 0.0, draw)
            yield (x0, x1[rows]) if cond is None else (x0, x1[rows], cond[rows])

    def after(update: int, value: float) -> None:
        if isinstance(trained, ContractingResidual):
            trained.keep_gate()
        average.update(trained)
        if tell:
            tell(update, value)

    weights = [each for each in (*trained.parameters(), *loss.parameters()) if each.requires_grad]
    lr = config.lr or (5e-4 if mode == "full" else 2e-3)
    losses = fit_steps(
        torch.optim.Adam(weights, lr=lr, fused=True),
        lambda x0, x, *c: loss(model, x0, x, *c, generator=draw),
        batches(),
        config.updates,
        clip=config.clip,
        tell=after,
    )
    for mean, weight in zip(average.model.parameters(), trained.parameters(), strict=True):
        mean.requires_grad_(weight.requires_grad)  # so that it can be trained on
    made, last = whole(average.model).eval(), losses[-max(1, len(losses) // 10) :]
    report |= sample_figures(made, x1[:CHUNK], None if cond is None else cond[:CHUNK], steps, config.method, draw)
    report |= {"first_loss": losses[0], "last_loss": sum(last) / len(last), "parameters": sum(each.numel() for each in weights)}
    report |= {"base_parameters": sum(each.numel() for each in base.parameters())}
    if isinstance(average.model, ContractingResidual):
        paths = (noise_for(x1[:64], None, 1.0, draw), 4, None if cond is None else cond[:64])
        report |= {"gate": float(average.model.gate.detach()), "certified_rate": average.model.certified_rate}
        # the certificate is the residual's alone: whether the sum contracts, the base's own log-norm decides
        report |= {
            "largest_log_norm_of_base": float(along_paths(base, *paths).max()),
            "largest_log_norm": float(along_paths(made, *paths).max()),
        }
    return FineTuned(made, None if mode == "full" else average.model, steps, config.method, report, model_digest(base))


def noise_for(x1: Tensor, latents: Tensor | None, mix: float, generator: torch.Generator) -> Tensor:
    """The x0 of each x1: its latent, and for a share `mix` of the rows (all where there are no latents) fresh noise."""
    if latents is not None and not mix:
        return latents
    fresh = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    if latents is None:
        return fresh
    random = torch.rand(len(x1), generator=generator, device=x1.device) < mix
    return torch.where(random.reshape(-1, *[1] * (x1.ndim - 1)), fresh, latents)


def check_data(x1: Tensor, cond: Tensor | None = None, latents: Tensor | None = None, field: nn.Module | None = None) -> None:
    """ValueError where data cannot be trained on."""
    for name, each in (("data", x1), ("cond", cond)):
        if not isinstance(each, Tensor) and (name == "data" or each is not None):
            raise ValueError(f"{name} is a {type(each).__name__}; expected a tensor x1, or the tuple (x1, cond) of two: torch.as_tensor")
    if x1.ndim < 2 or not len(x1) or x1.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"data are {tuple(x1.shape)} {x1.dtype}; expected float32 or float64 [N, ...], N >= 1: half precision trains badly here"
        )
    weights = dtype_of(dict(field.named_parameters())) if field is not None and any(True for _ in field.parameters()) else x1.dtype
    if weights != x1.dtype:
        raise ValueError(f"data are {x1.dtype} and the field's weights {weights}; expected the same dtype: convert one of them")
    for name, each in (("cond", cond), ("latents", latents)):
        if each is not None and (len(each) != len(x1) or (name == "latents" and each.shape != x1.shape)):
            raise ValueError(f"{name} is {tuple(each.shape)} for data {tuple(x1.shape)}; expected one row each")
    for name, each in (("data", x1), ("cond", cond), ("latents", latents)):
        if each is not None and not bool(each.isfinite().all()):
            row = int((~as_rows(each).isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{name} has a NaN or infinite number in row {row}; expected finite ones: drop or mend that row")


def checked_spread(x1: Tensor, cond: Tensor | None, pairing: str, force: bool) -> float:
    """How much the condition leaves open: refused without one, warned of where it is much."""
    if cond is None:
        if not force:
            raise ValueError(
                f"pairing {pairing!r} of unconditional data, which it pulls to their mean; expected 'invert', or a condition: "
                "give (x1, cond), or force=True"
            )
        return 1.0
    share = spread(x1, cond)
    if share > WIDE_SPREAD:
        warnings.warn(
            f"the condition leaves {share:.2f} of the data's variance open; expected at most {WIDE_SPREAD} for pairing {pairing!r}, which "
            "averages what it leaves open: use 'invert', or judge samples by their spread",
            stacklevel=3,
        )
    return share


def latent_figures(latents: Tensor) -> dict[str, float]:
    """How far latents are from N(0, I): their standard deviation, and KL(N(mean, diag variance) || N(0, I)) a dimension in nats."""
    rows = latents.flatten(1).double()
    mean, variance = rows.mean(0), rows.var(0, correction=0).clamp(min=1e-12)
    kl = 0.5 * (variance + mean.square() - 1 - variance.log()).mean()
    return {"latent_std": float((rows - rows.mean()).square().mean().sqrt()), "latent_kl": float(kl)}


def sample_figures(
    field: nn.Module, x1: Tensor, cond: Tensor | None, steps: int, method: str, generator: torch.Generator
) -> dict[str, float]:
    """Samples of fresh noise beside the data: a perfect reconstruction says nothing of noise that no latent comes near."""
    with torch.no_grad():
        samples = odeint(field, noise_for(x1, None, 1.0, generator), steps, method=method, cond=cond)
    return {"sample_std": float(samples.std(correction=0)), "data_std": float(x1.std(correction=0))}


def made_residual(base: nn.Module, x1: Tensor, cond: Tensor | None, mode: str, config: FineTuneConfig) -> nn.Module:
    """The residual of a mode, of initial weights that the seed alone says."""
    dim, cond_dim = x1[0].numel(), 0 if cond is None else cond[0].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if mode == "contracting":
            rate = float(cond is not None) if config.rate is None else config.rate
            made = ContractingResidual(dim, config.width, rate, cond_dim, gate=0.0)
        else:
            budget = config.share * sum(each.numel() for each in base.parameters())
            per_width = 2 * dim + cond_dim + 19  # 2 w^2 + per_width w, about what a VelocityMLP of width w has
            width = max(8, int((math.sqrt(per_width**2 + 8 * budget) - per_width) / 4))
            made = VelocityMLP(dim, cond_dim, width, residual=True)
    return made.to(x1)
