"""What S2FT refuses, and how: one clear error, nothing lost or half written."""

from __future__ import annotations

import pytest
from s2ft_models import EVERY, make, train, wrap
from transformers import BloomConfig, BloomForCausalLM

from fewer.language import S2FTConfig, S2FTModel, get_s2ft_model, select_units, to_peft_lora


@pytest.fixture
def saved(tmp_path):
    """The folder of a trained adapter."""
    model = wrap()
    train(model, 2)
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"d_ratio": 1.2}, "d_ratio is 1.2; expected a share between 0 and 1"),
        ({"o_ratio": -0.1}, "o_ratio is -0.1"),
        ({"d_ratio": 0.0}, "all of v_ratio, o_ratio, u_ratio and d_ratio are 0"),
        ({"selection": "best"}, "selection is 'best'; expected one of random, weight"),
        ({"order": "up"}, "order is 'up'"),
        ({"layout": "sorted"}, "layout is 'sorted'"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        S2FTConfig(**words)


def test_settings_survive_json_and_unknown_words_are_refused():
    config = S2FTConfig(o_ratio=0.1, target_families=("gated", "opt"), selection="gradient")
    assert S2FTConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown settings rank"):
        S2FTConfig.from_json('{"rank": 4}')


def test_an_unknown_family_is_told_with_its_classes():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM is of no known family .*BloomAttention, BloomBlock"):
        get_s2ft_model(bloom, S2FTConfig())
    with pytest.raises(ValueError, match=r"is of no known family \(opt\)"):
        get_s2ft_model(make("qwen2"), S2FTConfig(target_families="opt"))


@pytest.mark.parametrize("way", ["activation", "product", "gradient"])
def test_scores_of_activations_want_calibration(way):
    with pytest.raises(ValueError, match=f"selection '{way}' without calibration"):
        get_s2ft_model(make(), S2FTConfig(selection=way))
    with pytest.raises(ValueError, match="the calibration has no batches"):
        select_units(make(), S2FTConfig(selection=way), calibration=[])


def test_adapters_that_do_not_fit_are_refused_by_the_layers_name(saved, tmp_path):
    with pytest.raises(ValueError, match=r"changes model.layers.\d.\S+, which the model lacks"):
        S2FTModel.from_pretrained(make("opt"), saved)
    model = wrap("llama")
    with pytest.raises(ValueError, match=r"model.layers.\d.self_attn.v_proj is \[16, 16\], the adapter's \[8, 16\]"):
        model.load_adapter(saved, "a")
    with pytest.raises(ValueError, match="is no adapter; expected adapter_config.json"):
        model.load_adapter(tmp_path / "nothing", "a")
    (saved / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is no S2FT adapter that can be read"):
        S2FTModel.from_pretrained(make(), saved)


def test_merging_twice_is_refused():
    model = wrap()
    with pytest.raises(ValueError, match="merged already"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="is not merged"):
        model.unmerge_adapter()
    model.merge_and_unload()
    with pytest.raises(ValueError, match="merged or unloaded already"):
        model.merge_and_unload()


def test_adapters_of_different_bases_are_not_added(saved):
    other = get_s2ft_model(make(seed=1), S2FTConfig(**EVERY), adapter_name="mine")
    with pytest.raises(ValueError, match=r"was trained on other weights than these .*expected its base"):
        other.load_adapter(saved, "a")
    other.load_adapter(saved, "a", other_base=True)
    with pytest.raises(ValueError, match="belong to different bases"):
        other.add_adapters(["mine", "a"])
    assert set(other.adapters) == {"mine", "a"}
    with pytest.raises(ValueError, match="there is no adapter 'b'; expected one of mine, a"):
        other.set_adapter("b")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        other.load_adapter(saved, "a")


def test_a_state_of_another_selection_is_refused():
    model, other = wrap(**EVERY), wrap(**EVERY, seed=7)
    with pytest.raises(ValueError, match=r"lacks .*expected one of the same selection|trains other rows or columns"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="trains other rows or columns"):
        model.base_model.load_state_dict(other.base_model.state_dict(), strict=False)


def test_an_export_leaves_a_directory_with_something_in_it_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; expected a new directory"):
        to_peft_lora(wrap(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="holds thesis.txt, which fewer did not write there"):
        to_peft_lora(wrap(), tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_offloaded_weights_are_refused():
    model = make()
    with pytest.raises(ValueError, match="is not in memory"):
        get_s2ft_model(model.to("meta"), S2FTConfig())
