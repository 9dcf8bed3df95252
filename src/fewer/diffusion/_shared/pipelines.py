"""A diffusers directory as a thing to sample: unconditional, class-conditional or text-conditional; pixels or latents.

Its parts are opened one by one, by known classes, from safetensors; nothing that the directory brings along is run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.diffusion._shared.noise_schedule import NoiseSchedule
from fewer.diffusion._shared.peers import by_diffusers
from fewer.diffusion._shared.prediction import as_epsilon
from fewer.diffusion._shared.problems import Draw, Flow, kept
from fewer.diffusion._shared.spacing import noise_levels
from fewer.files import model_digest, read_json
from fewer.inputs import read_images
from fewer.tasks.digit_sampling import REFERENCE_STEPS, Denoise, unipc

NETWORKS = {  # folder -> class -> where diffusers has it
    "unet": {"UNet2DModel": "unets.unet_2d", "UNet2DConditionModel": "unets.unet_2d_condition"},
    "transformer": {"DiTTransformer2DModel": "transformers.dit_transformer_2d"},
}
SAFE: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
GUIDANCE = {"text": 7.5, "labels": 4.0}
NOISES, SAMPLING_STEPS = 16, 200
PROMPTS = ("a photograph of a cat", "a red house by a lake", "a bowl of fruit", "a city street at night", "mountains in snow", "a portrait")


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A diffusion model of diffusers.

    Attributes:
        network: in eval mode, called as `network(x, timestep, **condition)`.
        schedule, prediction_type: of its scheduler.
        shape: of one sample as the network sees it.
        classes: how many labels it takes; 0: none.
        null_label: the label that stands for none, where it has one.
        encode: prompts -> [B, words, width], where it takes text.
        autoencoder: between pixels and latents, where it has one.
        digest: of the network's weights.
    """

    network: nn.Module
    schedule: NoiseSchedule
    prediction_type: str
    shape: tuple[int, int, int]
    classes: int
    null_label: int | None
    encode: Callable[[list[str]], Tensor] | None
    autoencoder: Any
    digest: str
    device: str

    @property
    def can_be_guided(self) -> bool:
        return self.encode is not None or self.null_label is not None

    @property
    def ends(self) -> tuple[float, float]:
        """The largest and the smallest sigma / alpha."""
        times = torch.tensor([self.schedule.t_max, self.schedule.t_min], dtype=torch.float64)
        first, last = torch.exp(-self.schedule.lambda_(times)).tolist()
        return first, last

    def plain(self, count: int) -> dict[str, Tensor]:
        """The condition that says nothing; labels in turn where the network knows no "none"."""
        if self.encode is not None:
            return {"encoder_hidden_states": self.encode([""]).expand(count, -1, -1)}
        if self.null_label is not None:
            return {"class_labels": torch.full((count,), self.null_label, device=self.device)}
        return {"class_labels": torch.arange(count, device=self.device) % self.classes} if self.classes else {}

    def drawn(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Conditions to be guided to: labels, or prompts of a fixed list."""
        if self.encode is not None:
            which = torch.randint(len(PROMPTS), (count,), generator=generator).tolist()
            return {"encoder_hidden_states": self.encode([PROMPTS[i] for i in which])}
        return {"class_labels": torch.randint(self.classes, (count,), generator=generator).to(self.device)}

    def denoiser(self, condition: Callable[[int], dict[str, Tensor]]) -> Denoise:
        """D(x, sigma), x = clean + sigma * noise, under the condition of so many samples."""

        def denoise(x: Tensor, sigma: Any) -> Tensor:
            t = self.schedule.inverse(-torch.as_tensor(sigma).to("cpu", torch.float64).log())
            eps = as_epsilon(self.call, self.schedule, self.prediction_type, **condition(len(x)))
            return x - torch.as_tensor(sigma).to(x) * eps(self.schedule.alpha(t).to(x) * x, t)

        return denoise

    def flow(self) -> Flow:
        """The model as it is."""
        return self._flow(self.denoiser(self.plain), {"guidance": None})

    def guided(self, count: int, generator: torch.Generator) -> Flow:
        """The model guided to drawn conditions, classifier-free."""
        condition, scale = self.drawn(count, generator), GUIDANCE["text" if self.encode is not None else "labels"]
        plain, towards = self.denoiser(self.plain), self.denoiser(lambda _: condition)

        def denoise(x: Tensor, sigma: Any) -> Tensor:
            nothing = plain(x, sigma)
            return nothing + scale * (towards(x, sigma) - nothing)

        said = {name: float(value.double().sum()) for name, value in condition.items()}
        return self._flow(denoise, {"guidance": scale, "condition": said})

    def draws(self) -> dict[str, Draw]:
        """ "images" are the model as it is, "guided", where it can be, from the same noises towards drawn conditions."""

        def noise(draw: torch.Generator) -> Tensor:
            return self.flow().noise(NOISES, *self.shape, generator=draw).to(self.device)

        def guided(draw: torch.Generator) -> tuple[Flow, Tensor]:
            begin = noise(draw)
            return self.guided(NOISES, draw), begin

        return {"images": lambda draw: (self.flow(), noise(draw))} | ({"guided": guided} if self.can_be_guided else {})

    def samples(self, count: int, steps: int = SAMPLING_STEPS) -> Float[Tensor, "count channels height width"]:
        """What the model itself makes of noises by DPM-Solver++, made once: what stands in where there are no images."""
        flow = self.flow()

        def make() -> Tensor:
            draw, parts = torch.Generator().manual_seed(3), []
            for start in range(0, count, NOISES):
                noise = flow.noise(min(NOISES, count - start), *self.shape, generator=draw).to(self.device)
                parts.append(by_diffusers("dpm++2m", flow.denoise, noise, noise_levels(*flow.ends, steps)).cpu())
            return torch.cat(parts)

        return kept("pipeline-samples", "dpm++2m", {"model": self.digest, "count": count, "steps": steps}, make).to(self.device)

    def read(self, directory: str | Path) -> Float[Tensor, "M channels height width"]:
        """Images of a folder as the network sees them: pixels in [-1, 1], or latents."""
        vae = self.autoencoder
        scale = 2 ** (len(vae.config["block_out_channels"]) - 1) if vae is not None else 1  # pixels of a latent's side
        channels = self.shape[0] if vae is None else int(vae.config["in_channels"])
        pixels = read_images(directory, channels, (self.shape[1] * scale, self.shape[2] * scale))
        images = torch.from_numpy(pixels).to(self.device, torch.float32) / 127.5 - 1
        if vae is None:
            return images
        with torch.no_grad():
            return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(16)]) * vae.config["scaling_factor"]

    def call(self, x: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """What the network says at a training time; a variance that it learned beside it is left out."""
        return self.network(x, timestep.to(x.device).expand(len(x)), **condition).sample[:, : x.shape[1]]

    def _flow(self, denoise: Denoise, what: dict[str, object]) -> Flow:
        sigma_max, sigma_min = self.ends

        def reference(x: Tensor) -> Tensor:
            given = what | {"model": self.digest, "of": x.double().sum().item(), "shape": list(x.shape)}
            return kept(
                "pipeline-references", "unipc", given, lambda: unipc(denoise, x, REFERENCE_STEPS, sigma_max, sigma_min).contiguous().cpu()
            ).to(x)

        return Flow(denoise, NoiseSchedule.edm(sigma_min, sigma_max), reference)


def open_pipeline(directory: str | Path, device: str = "cpu") -> Pipeline:
    """The model in a directory that `DiffusionPipeline.save_pretrained` wrote.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a part of a class that is not known here, a scheduler that means something else, or files that cannot be read.
    """
    directory = Path(directory)
    folder = next((name for name in NETWORKS if (directory / name / "config.json").is_file()), None)
    if folder is None or not (directory / "scheduler" / "scheduler_config.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no unet/config.json (or transformer/) with scheduler/scheduler_config.json; expected a diffusers pipeline "
            "as save_pretrained writes it"
        )
    noise = read_json(directory / "scheduler" / "scheduler_config.json")
    network = _opened(directory / folder, {name: f"diffusers.models.{where}" for name, where in NETWORKS[folder].items()}, device)
    config: Any = network.config  # pyright: ignore[reportAssignmentType] - diffusers' own
    inward, outward, side = config["in_channels"], config["out_channels"] or config["in_channels"], config["sample_size"]
    if outward not in (inward, 2 * inward) or config.get("addition_embed_type"):
        raise ValueError(
            f"{directory / folder} takes {inward} channels and gives {outward}, or takes more than a text's embedding; expected a network "
            "of the noise in its own input: name another pipeline"
        )
    height, width = (side, side) if isinstance(side, int) else side
    classes = int(config.get("num_class_embeds") or 0) if folder == "unet" else int(config["num_embeds_ada_norm"])
    return Pipeline(
        network,
        NoiseSchedule.from_diffusers(noise),
        noise.get("prediction_type", "epsilon"),
        (inward, height, width),
        classes,
        classes if folder == "transformer" else None,
        _encoder(directory, device) if config.get("cross_attention_dim") and (directory / "text_encoder").is_dir() else None,
        _opened(directory / "vae", {"AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl"}, device)
        if (directory / "vae").is_dir()
        else None,
        model_digest(network),
        device,
    )


def _opened(folder: Path, known: dict[str, str], device: str) -> nn.Module:
    """A part of a pipeline, by the class that its config names; float32, eval mode, without gradients."""
    name = read_json(folder / "config.json").get("_class_name")
    if name not in known:
        raise ValueError(f"{folder / 'config.json'} names the class {name!r}; expected one of {', '.join(known)}: name another pipeline")
    try:
        made = getattr(importlib.import_module(known[name]), name).from_pretrained(folder, torch_dtype=torch.float32, **SAFE)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be opened ({why}); expected weights as safetensors that fit its config.json") from error
    return made.eval().requires_grad_(False).to(device)


def _encoder(directory: Path, device: str) -> Callable[[list[str]], Tensor]:
    """Prompts to the hidden states of CLIP's text model."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
    model: Any = CLIPTextModel.from_pretrained(directory / "text_encoder", torch_dtype=torch.float32, **SAFE)
    model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def encode(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
        return model(ids.input_ids.to(device))[0]

    return encode
