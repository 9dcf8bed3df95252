"""What is refused, each in one line that says what was given, what was expected and what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from skip_models import SHAPE, planted, settings, text, written

from fewer.language.ffn_skip import FFNSkipConfig, calibrate, disable_ffn_skip, enable_ffn_skip, ffn_skip, teacher_forced


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cold_start": -1}, "cold_start is -1; expected a whole number of at least 0"),
        ({"cold_start": 5}, "cold_start 5 and cold_end 5 leave no layer between them"),
        ({"max_skips": -1}, "max_skips is -1"),
        ({"max_skips": True}, "max_skips is True"),
        ({"p": 1.5}, "p is 1.5; expected a number from 0 to 1"),
        ({"p": math.nan}, "p is nan"),
        ({"threshold": math.nan}, "threshold is nan; expected a finite number"),
        ({"threshold": "0.9"}, "threshold is '0.9'"),
        ({"warmup_tokens": -1}, "warmup_tokens is -1"),
        ({"warmup_counts": "steps"}, "warmup_counts is 'steps'; expected one of generated, position"),
        ({"mode": "adaptative"}, "did you mean 'adaptive'"),
        ({"skip_prefill": "no"}, "skip_prefill is 'no'; expected True or False"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"static_layers": (2, 5)}, "static_layers holds 5; expected layers from 1 to 4"),
        ({"static_layers": 3}, "static_layers is 3; expected numbers of layers"),
        ({"static_layers": "23"}, "static_layers is '23'"),
        ({"mode": "layers", "cold_start": 0, "static_layers": (0,)}, "static_layers holds 0 in mode 'layers'"),
        ({"num_layers": 4}, "cold_end is 5; expected at most 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        settings(**given)


def test_settings_of_another_model_are_refused():
    with pytest.raises(ValueError, match="cold_end is 7; expected at most 6, the number of layers"):
        enable_ffn_skip(planted(), settings(cold_end=7))
    with pytest.raises(ValueError, match="for 8 layers and the model has 6; calibrate them on this model"):
        enable_ffn_skip(planted(), settings(num_layers=8))


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTJBlock": ("GPTJ", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8}),
    "PhiDecoderLayer": ("Phi", SHAPE),
    "Olmo2DecoderLayer": ("Olmo2", SHAPE),
    "GraniteDecoderLayer": ("Granite", SHAPE | {"residual_multiplier": 0.5}),
    "Gemma2DecoderLayer": ("Gemma2", SHAPE | {"head_dim": 8}),
    "MixtralDecoderLayer": ("Mixtral", SHAPE | {"num_local_experts": 2}),
    "StableLmDecoderLayer": ("StableLm", SHAPE | {"use_parallel_residual": True}),
}


@pytest.mark.parametrize("layer", OTHERS)
def test_layers_of_another_structure_are_refused_by_their_class(layer):
    name, shape = OTHERS[layer]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape)).eval()
    for refused in (lambda: enable_ffn_skip(model, settings(cold_end=2)), lambda: calibrate(model, text(1, 8))):
        with pytest.raises(ValueError, match=f"{layer}.*expected pre-norm layers"):
            refused()
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_of_the_same_structure_is_taken_whatever_its_name():
    for name, extra in (("Gemma", {"head_dim": 8}), ("Olmo", {}), ("SmolLM3", {}), ("Granite", {"residual_multiplier": 1.0})):
        shape = SHAPE | extra
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape)).eval()
        ids, config = text(1, 12), settings(threshold=-1)
        with ffn_skip(model, config) as stats:
            out, of_steps = written(model, ids, 6)
        assert stats.ratio == 0.5
        assert torch.allclose(of_steps, teacher_forced(model, out[:, :-1], config, 12)[0][:, 11:], atol=1e-4)


def test_a_model_that_trains_does_not_skip():
    model = planted()
    with ffn_skip(model, settings()):
        model.train()
        with pytest.raises(RuntimeError, match="train.*call model.eval"):
            model(text(1, 4))
        model.eval()(text(1, 4))


def test_enabled_twice_or_disabled_too_often_is_told():
    model = enable_ffn_skip(planted(), settings())
    with pytest.raises(ValueError, match="is enabled on this model.*call disable_ffn_skip first"):
        enable_ffn_skip(model, settings())
    disable_ffn_skip(model)
    with pytest.raises(ValueError, match="is not enabled on this model"):
        disable_ffn_skip(model)


def test_a_forward_of_somebody_elses_is_not_replaced():
    model = planted()
    layer = model.model.layers[3]
    layer.forward = own = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(ValueError, match="LlamaDecoderLayer has a forward that is not its class's"):
        enable_ffn_skip(model, settings())
    assert layer.forward is own
    assert not any("forward" in vars(each) for each in model.modules() if each is not layer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"target_skip": 1.0}, "target_skip is 1.0; expected a share of at least 0 and below 1"),
        ({"target_skip": -0.1}, "target_skip is -0.1"),
        ({"target_skip": math.nan}, "target_skip is nan"),
        ({"tokens": 0}, "tokens is 0"),
        ({"input_ids": torch.zeros(0, 8, dtype=torch.long)}, r"input_ids is \(0, 8\); expected at least 2 tokens"),
        ({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, r"input_ids is \(1, 1\)"),
        ({"input_ids": torch.zeros(9, dtype=torch.long)}, r"input_ids is \(9,\)"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        calibrate(planted(), **({"input_ids": text(1, 8)} | words))


def test_a_model_of_two_layers_or_of_no_finite_states_is_not_calibrated():
    shape = SHAPE | {"num_hidden_layers": 2}
    with pytest.raises(ValueError, match="the model has 2 layers; expected at least 3"):
        calibrate(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), text(1, 8))
    model = planted()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, text(1, 8))


def test_columns_to_start_at_are_whole_numbers():
    for wrong in (-1, torch.tensor([2.5])):
        with pytest.raises(ValueError, match="warmup_positions is .*; expected whole numbers of at least 0"):
            teacher_forced(planted(), text(1, 4), settings(), wrong)


def test_a_cache_with_missing_entries_takes_no_new_prompt():
    model, cache, ids = planted(), transformers.DynamicCache(), text(1, 12)
    with torch.no_grad(), ffn_skip(model, settings(mode="layers", static_layers=(2,))):
        for part in (ids[:, :5], *ids[:, 5:8].split(1, 1)):
            model(part, cache=cache, use_cache=True)
        with pytest.raises(ValueError, match="the cache lacks entries.*begin with the whole text again"):
            model(ids[:, 8:], cache=cache, use_cache=True)


def test_skips_that_were_not_kept_are_told():
    _, stats = teacher_forced(planted(), text(1, 4), settings(), 0)
    with pytest.raises(ValueError, match="per_token=True"):
        _ = stats.per_token


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a list"),
        ('{"cold_start": 1', "is not JSON"),
        ('{"cold_start": 1, "cold_end": 3}', "no threshold"),
        ('{"cold_start": 1, "cold_end": 3, "threshold": 0.9, "theta": 1}', "unknown settings theta"),
        ('{"cold_start": 1, "cold_end": 3, "threshold": NaN}', "threshold is nan"),
        ('{"cold_start": 1.0, "cold_end": 3, "threshold": 0.9}', "cold_start is 1.0"),
        ('{"cold_start": 1, "cold_end": 3, "threshold": 0.9, "static_layers": [[1]]}', "static_layers is"),
        ('{"cold_start": 1, "cold_end": 3, "threshold": 0.9, "mode": ["off"]}', "mode is"),
    ],
)
def test_files_that_are_none_are_refused_by_their_name(tmp_path, content, message):
    file = tmp_path / "skip.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"skip.json.*{message}"):
        FFNSkipConfig.load(file)
