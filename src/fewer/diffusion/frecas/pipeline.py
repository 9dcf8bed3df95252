"""FreCaS inside the pipelines of diffusers: Stable Diffusion, SDXL and SD3, called as they are, up to a larger image.

The pipeline's own loop calls the network and the scheduler. In the scheduler's place stands the cascade; the guided output is computed
there, in float32, from both halves of the batch as a hook on the network saw them, and what the pipeline makes of them is left aside.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewer.diffusion.frecas.cascade import Call, Generators, cascade_calls, enlarge, guided, stage_generators
from fewer.diffusion.frecas.maps import MapReuseProcessor, MapStore
from fewer.diffusion.frecas.schedules import stage_times
from fewer.diffusion.frecas.stages import FreCaSConfig, Size

NETWORKS = {"StableDiffusionPipeline": "unet", "StableDiffusionXLPipeline": "unet", "StableDiffusion3Pipeline": "transformer"}
TILED = 2048  # pixels above which the autoencoder works by tiles
FOREIGN = {  # arguments of a call that the cascade cannot follow, with what they may be
    "timesteps": (None,), "sigmas": (None,), "denoising_end": (None,), "guidance_rescale": (None, 0), "eta": (None, 0),
    "ip_adapter_image": (None,), "ip_adapter_image_embeds": (None,), "skip_guidance_layers": (None,),
}  # fmt: skip
Module = TypeVar("Module", bound=nn.Module)


class FreCaSPipeline:
    """A pipeline that samples by a cascade; the one it is made from is left as it is, also while this one runs.

    It is called with the pipeline's own arguments. `height` and `width`, where given, are those of the last stage, and
    `num_inference_steps` the sum of the stages'; `guidance_scale` takes the place of the config's `guidance`.

    Attributes:
        pipe: the pipeline of diffusers.
        config: the cascade.
        lift_seconds: what decoding, enlarging and encoding between the stages took in the last call.

    Source: arXiv 2410.18410.
    """

    def __init__(self, pipe: Any, config: FreCaSConfig) -> None:
        check_pipe(pipe, config)
        self.pipe, self.config, self.lift_seconds = pipe, config, 0.0

    @classmethod
    def from_pipe(cls, pipe: Any, config: FreCaSConfig) -> FreCaSPipeline:
        """From a StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline, whose weights are shared.

        Raises:
            ValueError: another pipeline, a size that its model cannot have, a schedule or a stage that cannot be.
        """
        return cls(pipe, config)

    def __call__(self, *args: Any, **words: Any) -> Any:
        """What the pipeline returns, at the last stage's size."""
        signature = inspect.signature(type(self.pipe).__call__)
        given = dict(signature.bind(self.pipe, *args, **words).arguments)
        given.pop("self")
        given |= given.pop("kwargs", {})
        stages, config = self.config.stages, self.config
        total = sum(stage.steps for stage in stages)
        expected = {"num_inference_steps": (None, total), "height": (None, stages[-1].grid[0]), "width": (None, stages[-1].grid[1])}
        for name, allowed in (FOREIGN | expected).items():
            if given.get(name) not in allowed:
                raise ValueError(
                    f"{name} is {given[name]!r}; expected {' or '.join(map(str, allowed))}: the cascade's plan is in its config"
                )
        if given.get("guidance_scale") is not None:
            config = replace(config, guidance=given["guidance_scale"])
        height, width = stages[0].grid
        given |= {"num_inference_steps": total, "height": height, "width": width, "guidance_scale": config.guidance}
        with frecas(twin_of(self.pipe), config, given.get("generator")) as twin:
            answer = twin(**given)
            self.lift_seconds = twin.scheduler.lift_seconds
        return answer


@contextlib.contextmanager
def frecas(pipe: Any, config: FreCaSConfig, generator: Generators = None) -> Iterator[Any]:
    """Inside the block `pipe(...)` samples by a cascade; after it, also after an exception, the pipeline is what it was.

    The block's calls are of the first stage's size (the model's own by default); guidance and steps are the config's. For calls at the
    same time from other threads, use `FreCaSPipeline`.

    Args:
        generator: for the noise between stages where the pipeline does not hand its own to schedulers, as SD3's does not.
    """
    check_pipe(pipe, config)
    network = _network(pipe)
    maps = MapStore(config.map_weight, config.map_resize) if config.map_weight and len(config.stages) > 1 else None
    scheduler = CascadeScheduler(pipe, config, maps, generator)
    parts = vars(pipe)  # past the pipeline's __setattr__, which would write another class into its config
    with contextlib.ExitStack() as undo:
        undo.callback(parts.__setitem__, "scheduler", parts["scheduler"])
        parts["scheduler"] = scheduler
        undo.callback(network.register_forward_pre_hook(scheduler.before, with_kwargs=True).remove)
        undo.callback(network.register_forward_hook(scheduler.after).remove)
        if maps:
            for layer in cross_attentions(network):
                undo.callback(layer.set_processor, layer.processor)
                layer.set_processor(MapReuseProcessor(maps, layer.processor))
        if max(max(stage.grid) for stage in config.stages) > TILED and not pipe.vae.use_tiling:
            undo.callback(pipe.vae.disable_tiling)
            pipe.vae.enable_tiling()
        yield pipe


class CascadeScheduler:
    """The cascade in a scheduler's place; `frecas` makes it.

    Attributes:
        timesteps: those of all stages.
        lift_seconds: spent between stages since `set_timesteps`.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, pipe: Any, config: FreCaSConfig, maps: MapStore | None, generator: Generators) -> None:
        self.pipe, self.plan, self.maps, self.generator = pipe, config, maps, generator
        self.scheduler, self.config = pipe.scheduler, pipe.scheduler.config
        self.times = stage_times(config, self.scheduler)
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, mu: float | None = None) -> None:
        """Begin anew; the numbers of steps, and flow matching's shift `mu`, are the plan's own."""
        self.timesteps = torch.tensor([t for times in self.times for t in times], device=device)
        self.lift_seconds, self._calls, self._output = 0.0, None, torch.empty(0)
        self._call = Call(0, 0.0, self._output)
        self._noise: list[Any] = []
        self._posteriors: Iterator[Any] = iter(())
        if self.maps:
            self.maps.clear()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def before(self, network: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Ahead of a call of the network: begin the cascade with the first, and say SDXL the stage's size where it is wanted."""
        x = args[0] if args else words["hidden_states"]
        if self._calls is None:
            wanted = tuple(side // self.pipe.vae_scale_factor for side in self.plan.stages[0].grid)
            if tuple(x.shape[-2:]) != wanted:
                raise ValueError(
                    f"latents of {x.shape[-2]} x {x.shape[-1]}; expected {wanted[0]} x {wanted[1]}, those of stages[0].size "
                    f"{self.plan.stages[0].size}: call the pipeline with that height and width"
                )
            self._calls = cascade_calls(self.plan, self.scheduler, self._lift, self._noise, x[:1], self.maps)
            self._call = next(self._calls)
        added = words.get("added_cond_kwargs") or {}
        if self.plan.micro_size == "target" and self._call.stage and "time_ids" in added:
            ids, size = added["time_ids"].clone(), self.plan.stages[self._call.stage].grid
            ids[:, 0:2] = ids[:, 4:6] = torch.tensor(size).to(ids)  # original and target size stand around the crop's corner
            words = words | {"added_cond_kwargs": added | {"time_ids": ids}}
        return args, words

    def after(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep what the network said of both halves."""
        self._output = output[0] if isinstance(output, tuple) else output.sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None, return_dict: bool = True) -> Any:
        """The sample at the next call's time, or where a stage ends, at the next stage's size."""
        if self._calls is None:
            raise ValueError("step before the network was called; expected the pipeline's own loop: use cascade_calls in another")
        if len(self._output) != 2 * len(sample):
            raise ValueError(
                "the network was called without guidance (or once more); expected guidance_scale above 1, and no skipped layers"
            )
        for name in ("guidance_rescale", "denoising_end"):
            if getattr(self.pipe, name, None):
                raise ValueError(f"{name} is {getattr(self.pipe, name)}; expected none: the cascade guides by bands to its own end")
        if not self._noise:
            count = len(self.times)
            seeded = stage_generators(generator if generator is not None else self.generator, 2 * count)
            self._noise[:], self._posteriors = seeded[:count], iter(seeded[count:])
        stage = self._call.stage
        before = tuple(side // self.pipe.vae_scale_factor for side in self.plan.stages[max(stage - 1, 0)].grid)
        uncond, cond = self._output.float().chunk(2)
        try:
            self._call = self._calls.send((guided(self.plan, stage, uncond, cond, before), sample))
            x = self._call.x
        except StopIteration as ended:
            x, self._calls = ended.value, None
        return SimpleNamespace(prev_sample=x) if return_dict else (x,)

    def _lift(self, clean: Tensor, size: Size) -> Tensor:
        """Decode, clip, enlarge, encode: a sample of the posterior."""
        started, vae = time.perf_counter(), self.pipe.vae
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        dtype = vae.dtype
        single = dtype == torch.float16 and vae.config.force_upcast  # SDXL's overflows in half precision
        try:
            vae.to(torch.float32) if single else None
            image = vae.decode(clean.to(vae.dtype) / scale + shift).sample.clamp(-1, 1)
            posterior = vae.encode(enlarge(image, size, self.plan.upsample)).latent_dist
            latents = (posterior.sample(next(self._posteriors)) - shift) * scale
        finally:
            vae.to(dtype) if single else None
        self.lift_seconds += time.perf_counter() - started
        return latents.to(clean.dtype)


def check_pipe(pipe: Any, config: FreCaSConfig) -> None:
    """ValueError where a pipeline cannot sample by this cascade; the message names the stage and the field."""
    network = _network(pipe)
    factor = pipe.vae_scale_factor * (network.config.get("patch_size") or 1)
    for j, stage in enumerate(config.stages):
        if any(side % factor for side in stage.grid):
            raise ValueError(f"stages[{j}].size is {stage.size}; expected sides divisible by {factor}, the model's factor")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError("the autoencoder shifts latents by latents_mean; expected one with scaling_factor alone: use another pipeline")
    if config.map_weight and not cross_attentions(network):
        raise ValueError(f"map_weight is {config.map_weight}; expected 0: this pipeline's network has no cross-attention")
    stage_times(config, pipe.scheduler)


def cross_attentions(network: nn.Module) -> list[Any]:
    """The layers in which an image attends to a text."""
    from diffusers.models.attention_processor import Attention

    layers: list[Any] = [each for each in network.modules() if isinstance(each, Attention)]
    return [each for each in layers if each.is_cross_attention or each.added_kv_proj_dim is not None]


def twin_of(pipe: Any) -> Any:
    """A pipeline of the same weights whose network and autoencoder may be hooked without the other's knowing."""
    twin, name = copy.copy(pipe), NETWORKS[_kind(pipe)]
    vars(twin).update({name: _same_weights(getattr(pipe, name)), "vae": _same_weights(pipe.vae)})
    return twin


def _same_weights(module: Module) -> Module:
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def _kind(pipe: Any) -> str:
    found = next((base.__name__ for base in type(pipe).__mro__ if base.__name__ in NETWORKS), None)
    if found is None:
        raise ValueError(f"pipe is a {type(pipe).__name__}; expected one of {', '.join(NETWORKS)}")
    return found


def _network(pipe: Any) -> Any:
    return getattr(pipe, NETWORKS[_kind(pipe)])
