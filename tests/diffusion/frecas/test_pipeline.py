"""The cascade inside the pipelines of diffusers, tiny and with random weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hosts import SCALED, autoencoder, class_conditional, stable_diffusion, stable_diffusion_xl

from fewer.diffusion import FreCaSConfig, FreCaSPipeline, Stage
from fewer.diffusion.frecas import enlarge, frecas

CONFIG = FreCaSConfig((Stage(16, 4, 300), Stage((24, 32), 3, 0)), guidance=3.0, high_guidance=9.0)


class FourTimes(DDIMScheduler):
    """DDIM at 999 666 333 0 that steps to the next of them; stock, it would step by 1000 // 4."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, device)
        self.num_inference_steps = 3


@pytest.fixture(scope="module")
def tokenizer(pipelines):
    return pipelines / "text" / "tokenizer"


def images_of(pipe, **words):
    draw = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=draw, **{"output_type": "np", "num_inference_steps": 4} | words).images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_single_stage_is_the_pipeline_itself(tokenizer, prediction):
    words = {"timestep_spacing": "linspace", "prediction_type": prediction, "clip_sample": False, "set_alpha_to_one": False}
    pipe = stable_diffusion(tokenizer, FourTimes(**SCALED | words))
    stock = images_of(pipe, guidance_scale=3.0, output_type="latent")
    assert pipe.scheduler.timesteps.tolist() == [999, 666, 333, 0]
    ours = images_of(FreCaSPipeline.from_pipe(pipe, FreCaSConfig((Stage(16, 4, 0),), guidance=3.0)), output_type="latent")
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def state_of(pipe):
    network = getattr(pipe, "unet", None) or pipe.transformer
    hooks = [len(network._forward_hooks), len(network._forward_pre_hooks)]
    return (
        pipe.scheduler,
        copy.deepcopy(dict(pipe.config)),
        list(network.attn_processors.values()),
        hooks,
        pipe.vae.use_tiling,
        pipe.vae.dtype,
    )


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_a_pipeline_is_what_it_was_after_the_cascade_and_after_an_exception(tokenizer, make):
    pipe = make(tokenizer)
    before, state = images_of(pipe), state_of(pipe)

    def broken(pipe, step, t, values):
        if step == 5:
            raise KeyboardInterrupt
        return values

    with frecas(pipe, CONFIG):
        light = images_of(pipe, guidance_scale=3.0)
        assert (images_of(pipe, guidance_scale=3.0) == light).all(), "a second call begins anew"
    large = FreCaSPipeline.from_pipe(pipe, CONFIG)
    assert light.shape == (1, 24, 32, 3)
    assert (images_of(large, num_inference_steps=7) == light).all(), "both forms give the same image"
    assert large.lift_seconds > 0
    for form in (lambda: images_of(large, num_inference_steps=7, callback_on_step_end=broken), lambda: light_form(pipe, broken)):
        with pytest.raises(KeyboardInterrupt):
            form()
        now = state_of(pipe)
        assert now[0] is state[0]
        assert all(one is other for one, other in zip(now[2], state[2], strict=True))
        assert now[1:2] + now[3:] == state[1:2] + state[3:]
        assert (images_of(pipe) == before).all()


def test_a_pipeline_is_as_it_was_while_its_twin_runs(tokenizer):
    pipe, seen = stable_diffusion(tokenizer), []
    state = state_of(pipe)

    def look(twin, step, t, values):
        now = state_of(pipe)
        seen.append(now[0] is state[0] and now[1:2] + now[3:] == state[1:2] + state[3:])
        seen.append(all(one is other for one, other in zip(now[2], state[2], strict=True)))
        assert twin.unet.conv_in.weight is pipe.unet.conv_in.weight, "weights are shared"
        return values

    images_of(FreCaSPipeline.from_pipe(pipe, CONFIG), num_inference_steps=7, callback_on_step_end=look)
    assert seen == [True] * 14


def light_form(pipe, callback):
    with frecas(pipe, CONFIG):
        images_of(pipe, callback_on_step_end=callback)


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_several_images_callbacks_half_precision_and_two_pipelines(tokenizer, make):
    pipe, seen = make(tokenizer), []
    large = FreCaSPipeline.from_pipe(pipe, CONFIG)

    def noted(pipe, step, t, values):
        seen.append((int(t), tuple(values["latents"].shape[-2:])))
        return values

    words = {"num_inference_steps": 7, "num_images_per_prompt": 2}
    found = images_of(large, callback_on_step_end=noted, **words)
    assert found.shape == (2, 24, 32, 3)
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert [size for _, size in seen] == [(8, 8)] * 3 + [(12, 16)] * 4
    assert [t for t, _ in seen][:4] == [999, 766, 533, 300]
    other = FreCaSPipeline.from_pipe(make(tokenizer, pipe.scheduler), CONFIG)
    assert (images_of(other, **words) == found).all()
    listed = large(
        "a cat", generator=[torch.Generator().manual_seed(s) for s in (0, 1)], num_images_per_prompt=2, output_type="latent"
    ).images
    swapped = large(
        "a cat", generator=[torch.Generator().manual_seed(s) for s in (1, 0)], num_images_per_prompt=2, output_type="latent"
    ).images
    torch.testing.assert_close(listed, swapped.flip(0), atol=1e-4, rtol=1e-4)
    half = FreCaSPipeline.from_pipe(make(tokenizer, dtype=torch.bfloat16), CONFIG)
    latents, single = (images_of(each, num_inference_steps=7, output_type="latent") for each in (half, large))
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - single).norm() < 0.3 * single.norm()


def test_maps_and_bands_and_matched_starts_each_change_the_image(tokenizer):
    pipe = stable_diffusion(tokenizer)
    one, seen = images_of(FreCaSPipeline(pipe, CONFIG), num_inference_steps=7), []
    others = {
        "map_weight": 0.0,
        "map_resize": "released",
        "high_guidance": 3.0,
        "gamma": 0.0,
        "upsample": "nearest",
        "stepping": "released",
    }
    for name, value in others.items():
        found = images_of(FreCaSPipeline(pipe, replace(CONFIG, **{name: value})), num_inference_steps=7)
        seen.append(found)
        assert np.abs(found - one).max() > 1e-6, name
    with frecas(pipe, replace(CONFIG, map_weight=0.0)):
        assert (images_of(pipe, guidance_scale=3.0) == seen[0]).all()
        assert all(type(each).__name__ == "AttnProcessor2_0" for each in pipe.unet.attn_processors.values())


@pytest.mark.parametrize(("micro_size", "last"), [("first", [16, 16, 0, 0, 16, 16]), ("target", [24, 32, 0, 0, 24, 32])])
def test_sdxl_is_told_the_first_size_or_each_stages_own(tokenizer, micro_size, last):
    pipe, told = stable_diffusion_xl(tokenizer), {}

    def listen(network, args, words):
        told[tuple(args[0].shape[-2:])] = words["added_cond_kwargs"]["time_ids"][0].tolist()

    with frecas(pipe, replace(CONFIG, micro_size=micro_size)):
        pipe.unet.register_forward_pre_hook(listen, with_kwargs=True)
        images_of(pipe)
    assert told == {(8, 8): [16, 16, 0, 0, 16, 16], (12, 16): last}


@torch.no_grad()
def test_a_lift_clips_the_decoded_image_enlarges_it_and_draws_from_the_posterior(tokenizer):
    pipe, clean = stable_diffusion(tokenizer), torch.randn(1, 4, 8, 8)
    vae, scale = pipe.vae, pipe.vae.config.scaling_factor
    vae.decoder.conv_out.weight.mul_(100)
    image = vae.decode(clean / scale).sample
    assert image.abs().max() > 2
    posterior = vae.encode(enlarge(image.clamp(-1, 1), (24, 32))).latent_dist
    wanted = scale * posterior.sample(torch.Generator().manual_seed(5))
    with frecas(pipe, CONFIG):
        pipe.scheduler._posteriors = iter([torch.Generator().manual_seed(5)])
        torch.testing.assert_close(pipe.scheduler._lift(clean, (24, 32)), wanted)
    assert (wanted - scale * posterior.mode()).abs().max() > 0.01


def test_other_schedulers_of_the_pipeline_give_their_betas(tokenizer):
    pipe = stable_diffusion(tokenizer, EulerDiscreteScheduler(**SCALED))
    assert images_of(FreCaSPipeline(pipe, CONFIG), num_inference_steps=7).shape == (1, 24, 32, 3)


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    texts = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sd3_goes_through_joint_attention_and_flow_matching():
    pipe, draw = stable_diffusion_3(), torch.Generator().manual_seed(3)
    text, pooled = torch.randn(2, 1, 5, 16, generator=draw), torch.randn(2, 1, 8, generator=draw)
    words = {
        "prompt_embeds": text[0], "negative_prompt_embeds": text[1], "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1], "output_type": "latent",
    }  # fmt: skip

    def latents(pipe, **more):
        return pipe(generator=torch.Generator().manual_seed(0), **words, **more).images

    before = latents(pipe, num_inference_steps=3)
    config = replace(CONFIG, gamma=1.0, stages=(Stage(16, 4, 50), Stage((24, 32), 3, 0)))
    found = latents(FreCaSPipeline.from_pipe(pipe, config))
    assert found.shape == (1, 4, 12, 16)
    assert torch.equal(found, latents(FreCaSPipeline.from_pipe(pipe, config)))
    without = latents(FreCaSPipeline.from_pipe(pipe, replace(config, map_weight=0.0)))
    assert (found - without).abs().max() > 1e-6
    assert torch.equal(latents(pipe, num_inference_steps=3), before)
    single = FreCaSPipeline.from_pipe(pipe, FreCaSConfig((Stage(16, 4, 0),), guidance=3.0))
    sigmas = [1.0, 0.666, 0.333, 0.0]  # stock: Euler along the same times
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(latents(single), latents(pipe, sigmas=sigmas, guidance_scale=3.0), atol=1e-4, rtol=1e-4)


def test_joint_attention_adds_the_text_maps_scaled_by_their_share():
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    from fewer.diffusion import MapReuseProcessor, MapStore

    layer, store = stable_diffusion_3().transformer.transformer_blocks[0].attn, MapStore(0.5)
    image, text = torch.randn(2, 16, 16), torch.randn(2, 5, 16)
    plain = layer(image, text)
    layer.set_processor(MapReuseProcessor(store, JointAttnProcessor2_0()))
    store.turn((8, 8), collecting=True, mixing=False)
    layer(image, text)
    store.settle()
    query, key = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (layer.to_q(image), layer.add_k_proj(text)))
    torch.testing.assert_close(store.map, (query @ key.mT / 8**0.5).softmax(-1).mean(1), atol=1e-5, rtol=0)
    store.turn((8, 8), collecting=False, mixing=True)
    mixed = layer(image, text)
    added = 0.5 * 5 / 16 * store.map @ layer.add_v_proj(text) @ layer.to_out[0].weight.T
    torch.testing.assert_close(mixed[0], plain[0] + added, atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_inference_steps": 50}, "num_inference_steps is 50; expected None or 7"),
        ({"height": 64}, "height is 64"),
        ({"guidance_scale": 1.0}, "guidance is 1.0; expected a number above 1"),
        ({"guidance_rescale": 0.7}, "guidance_rescale is 0.7"),
        ({"eta": 1.0}, "eta is 1.0"),
    ],
)
def test_a_call_that_the_cascade_cannot_follow_is_refused(tokenizer, words, message):
    with pytest.raises(ValueError, match=message):
        FreCaSPipeline(stable_diffusion(tokenizer), CONFIG)("a cat", **words)


def test_the_light_form_refuses_what_it_would_have_to_ignore(tokenizer):
    pipe = stable_diffusion(tokenizer)
    for words, message in (({"height": 32, "width": 32}, r"stages\[0\].size"), ({"guidance_scale": 1.0}, "without guidance"),
                           ({"guidance_rescale": 0.5}, "guidance_rescale is 0.5")):  # fmt: skip
        with pytest.raises(ValueError, match=message), frecas(pipe, CONFIG):
            images_of(pipe, **words)
    assert images_of(pipe).shape == (1, 16, 16, 3)


def test_pipelines_that_cannot_be_are_refused(tokenizer):
    pipe = stable_diffusion(tokenizer)
    with pytest.raises(ValueError, match="expected one of StableDiffusionPipeline"):
        FreCaSPipeline.from_pipe(class_conditional(DDIMScheduler()), CONFIG)
    with pytest.raises(ValueError, match=r"stages\[1\].size is 33; expected sides divisible by 2"):
        FreCaSPipeline.from_pipe(pipe, FreCaSConfig((Stage(16, 4, 300), Stage(33, 3, 0))))
    clipping = stable_diffusion_xl(tokenizer, DDIMScheduler(**SCALED, clip_sample=True))
    with pytest.raises(ValueError, match="clip_sample=False"):
        FreCaSPipeline.from_pipe(clipping, CONFIG)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from hosts import BLOCKS, U_NET

    blind = stable_diffusion(tokenizer)
    vars(blind)["unet"] = UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=8, mid_block_type=None, **U_NET | BLOCKS)
    with pytest.raises(ValueError, match="no cross-attention"):
        FreCaSPipeline.from_pipe(blind, CONFIG)
