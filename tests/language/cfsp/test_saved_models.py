"""A pruned model is a model like any other: in each family and dtype, after each thing that can happen to it, it is read back as it was."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from typer.main import get_command

from fewer.language._shared.feed_forward import decoder_layers, parts_of, width_of
from fewer.language._shared.model_directory import load_directory
from fewer.language._shared.modeling_fewer import PLAIN
from fewer.language.cfsp import calibrate, prune, recover, save_pruned
from fewer.language.cfsp.command import prune as prune_verb
from fewer.tasks import micro_lm
from fewer.tasks.language_corpus import Corpus, train_tokenizer

IDS = torch.randint(1, 100, (3, 24), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WORDS = " ".join(f"word{number} said {number * 7}" for number in range(400))


def make(family, **words):
    """A small random model of a family; its layers move the residual stream differently far."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CONFIG_MAPPING[family](**sizes, num_key_value_heads=1, head_dim=16, pad_token_id=0, **words)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for number, layer in enumerate(decoder_layers(model)):
            for linear in parts_of(layer):
                linear.weight.mul_(1.6**number)
    return model


def pruned(family="llama", dtype=torch.float32, **words):
    model = make(family, **words).to(dtype)
    report = prune(model, calibrate(model, [IDS]), 0.5, multiple_of=8)
    assert len(set(report.widths)) > 1
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("export", ["list", "padded"])
def test_every_family_is_pruned_saved_and_read_back(family, export, tmp_path):
    model = pruned(family)
    assert torch.isfinite(logits(model)).all()
    save_pruned(model, tmp_path / "out", export=export)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert (type(loaded) is type(model)) == (export == "list")
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert kind == (f"fewer_{family}" if export == "list" else family)


STATES = {
    "pruned": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: through_pickle(model),
    "recovered": lambda model: (recover(model, IDS.flatten(), 2, scores=[0.2, 0.3, 0.5], batch=2, window=8), model)[1],
    "trained": lambda model: (a_step(model), model)[1],
    "saved before": lambda model: (model.save_pretrained("before"), AutoModelForCausalLM.from_pretrained("before"))[1],
}


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # what this test has written itself


def a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", STATES)
def test_save_pretrained_alone_writes_what_loads_after_whatever_happened(state, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = STATES[state](pruned(dtype=dtype))
    model.save_pretrained("out")
    loaded = AutoModelForCausalLM.from_pretrained("out")
    assert loaded.dtype == model.dtype == dtype
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert [width_of(layer) for layer in decoder_layers(loaded)] == loaded.config.intermediate_size == model.config.intermediate_size


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_are_stored_once(tied, tmp_path):
    model = pruned(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, copy.deepcopy(model), loaded):
        assert (each.lm_head.weight is each.model.embed_tokens.weight) == tied
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert abs(stored - 4 * sum(p.numel() for p in model.parameters())) < 5_000


def test_what_was_to_be_trained_and_evaluated_still_is():
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    frozen, modes = ["model.layers.1.mlp.up_proj.weight"], {name: module.training for name, module in model.named_modules()}
    prune(model, calibrate(model, [IDS]), 0.5, multiple_of=8)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("share", ["module", "weight"])
def test_layers_that_share_weights_are_refused_by_name(share):
    model = make("llama")
    if share == "module":
        model.model.layers[2].mlp = model.model.layers[0].mlp
    else:
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.\w+.weight and model.layers.2.mlp.\w+.weight are one weight"):
        calibrate(model, [IDS])


def test_a_family_that_cannot_be_saved_is_refused_before_it_is_cut():
    class Stranger(type(make("llama"))):
        pass

    model = make("llama")
    model.__class__ = Stranger
    stats = calibrate(model, [IDS])
    with pytest.raises(ValueError, match=r"Stranger \(llama\) is of no family whose layers may differ in width .*global_metric='none'"):
        prune(model, stats, 0.5, multiple_of=8)
    assert {width_of(layer) for layer in decoder_layers(model)} == {64}
    prune(model, stats, 0.5, global_metric="none", multiple_of=8)
    assert model.config.intermediate_size == 32


def test_statistics_that_are_no_numbers_are_told_as_such():
    model = make("llama")
    stats = calibrate(model, [IDS])
    stats.distances["angular"][1] = torch.nan
    with pytest.raises(ValueError, match="the importance of block 1 is nan; expected finite numbers"):
        prune(model, stats, 0.5, multiple_of=8)
    stats = calibrate(model, [IDS])
    stats.channel_norm[2, 7] = torch.nan
    with pytest.raises(ValueError, match="channel_norm of channel 7 is not finite"):
        prune(model, stats, 0.5, multiple_of=8)
    assert {width_of(layer) for layer in decoder_layers(model)} == {64}, "nothing is cut before all is known"


# The verb


def directory(folder, dtype):
    model = micro_lm().to(dtype)
    model.save_pretrained(folder)
    train_tokenizer(Corpus((("a", WORDS),), (), "here")).save_pretrained(folder)
    (folder / "text.txt").write_text(WORDS)
    return folder


def run(*words):
    """`fewer prune` in this process, with its options read as from a command line."""
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(prune_verb)
    get_command(app)([str(word) for word in words], standalone_mode=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("export", ["list", "padded", "uniform"])
def test_the_verb_keeps_the_dtype_that_it_read(dtype, export, tmp_path):
    dense = directory(tmp_path / "dense", dtype)
    words = ["--text", dense / "text.txt", "--ratio", 0.5, "--multiple-of", 16, "--windows", 2, "--window", 32, "--export", export]
    run(dense, tmp_path / "out", *words, "--recover-steps", 2, "--recover-batch", 1)
    model, _ = load_directory(tmp_path / "out")
    assert model.dtype == dtype
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "out", dense)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "1.5"], "1.5"),
        (["--windows", "-1"], "-1"),
        (["--window", "0"], "0"),
        (["--multiple-of", "0"], "0"),
        (["--recover-batch", "-1"], "-1"),
        (["--recover-steps", "-1"], "-1"),
        (["--seed", str(10**30)], "0<=x<=4294967295"),
        (["--metric", "best"], "best"),
        (["--export", "zip"], "zip"),
        (["--multiple-of", "100", "--ratio", "0.5"], "layer 0 would keep no channels"),
        (["--multiple-of", "129"], "multiple_of is 129; expected 1 to 128"),
        (["--ratio", "0.001", "--export", "uniform", "--multiple-of", "16"], "keep every channel"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_passed(words, message, tmp_path, monkeypatch):
    import click

    from fewer.errors import UserError

    dense = directory(tmp_path / "dense", torch.float32)
    monkeypatch.setattr("fewer.language.cfsp.calibration._pass", lambda *_: pytest.fail("the model was passed"))
    with pytest.raises((ValueError, UserError, click.UsageError), match=message):
        run(dense, tmp_path / "out", "--text", dense / "text.txt", "--window", 32, "--multiple-of", 16, *words)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    dense = directory(tmp_path / "dense", torch.float32)
    monkeypatch.setattr("fewer.language._shared.model_directory.load_directory", lambda *_, **__: pytest.fail("the model was read"))
    for place in (dense, tmp_path, dense / "text.txt", dense / "text.txt" / "below"):
        with pytest.raises(OSError, match="expected"):
            run(dense, place, "--text", dense / "text.txt", "--overwrite")
    assert (dense / "model.safetensors").exists()


class Told(torch.Tensor):
    """Ids that keep where they were sent."""

    sent: tuple = ()

    def to(self, *args, **kwargs):
        Told.sent += args
        return super().to(*args, **kwargs)


def test_ids_and_masks_are_sent_to_where_the_model_is():
    model, Told.sent = make("llama"), ()
    calibrate(model, [{"input_ids": IDS.as_subclass(Told), "attention_mask": torch.ones_like(IDS).as_subclass(Told)}])
    assert list(Told.sent).count(model.model.embed_tokens.weight.device) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ids_go_to_where_the_model_is():
    model = make("llama").cuda()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    stats = calibrate(model, [IDS, {"input_ids": IDS, "attention_mask": mask}])
    report = prune(model, stats, 0.5, multiple_of=8)
    losses = recover(model, IDS.flatten(), 2, scores=report.scores, batch=2, window=8)
    assert len(losses) == 2
    assert model.model.layers[0].mlp.up_proj.weight.is_cuda
