"""Directories and journals: a model that is never held, a fine-tuned one in some bytes, and what transformers makes of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.initialization import no_init_weights
from zo2_models import DECAY, IDS, LR, make, mezo_steps, same, seeds, streamed

from fewer.language import ZO2, MeZO, ZO2Config, ZO2Trainer, replay

WORDS = {"lr": LR, "weight_decay": DECAY, "working_device": "cpu"}


def saved(folder, name="llama-tied"):
    make(name).save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "gpt2"])
@pytest.mark.parametrize("store", ["none", "cpu", "disk"])
def test_a_directory_is_read_trained_written_and_read_again(name, store, tmp_path):
    base = saved(tmp_path, name)
    model = make(name)
    told = mezo_steps(model, seeds(3))
    words = {"store_dir": str(tmp_path / "store")} if store == "disk" else {}
    zo2 = ZO2.from_pretrained(base, ZO2Config(**WORDS, store=store, **words))
    assert [zo2.step(IDS)[:2] for _ in range(3)] == told
    out = zo2.save_pretrained(tmp_path / "out")
    assert zo2.pending is None
    again = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    assert same(zo2, model)
    assert all(torch.equal(value, again.get_parameter(key)) for key, value in model.named_parameters())
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(again.generate(IDS, **words), model.eval().generate(IDS, **words))


@pytest.mark.parametrize("more", [{}, {"rng": "counter"}, {"store_dtype": "bfloat16", "store_rounding": "stochastic"}])
def test_base_and_journal_are_the_trained_weights(more, tmp_path):
    base = saved(tmp_path)
    zo2 = ZO2.from_pretrained(base, ZO2Config(**WORDS, store="disk", store_dir=str(tmp_path / "store"), **more))
    for step in range(4):
        zo2.lr = LR / (step + 1)
        zo2.step(IDS)
    out = zo2.save_pretrained(tmp_path / "out")
    journal = tmp_path / "out" / "journal.json"
    assert len(json.loads(journal.read_text())["updates"]) == 4
    replay(base, journal, tmp_path / "again")
    replay(base, journal, tmp_path / "streamed", store_dir=tmp_path / "blocks")
    weights = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    for other in ("again", "streamed"):
        assert {file.name: file.read_bytes() for file in (tmp_path / other).glob("*.safetensors")} == weights
    other = make("llama-tied")
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"journal.json is of a model with digest \w+; expected \w+, that of"):
        replay(tmp_path / "other", journal, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_journal_of_a_model_in_memory_is_that_of_its_directory(tmp_path):
    base = saved(tmp_path)
    assert len({streamed(make("llama-tied")).base, ZO2.from_pretrained(base, ZO2Config(store="cpu")).base}) == 1


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import accelerate
from fewer.language.zo2.streaming import ZO2
from fewer.language.zo2.mezo import ZO2Config
from fewer.meters import peak_resident_memory
from fewer.meters.resident_memory import _high_water_mark, _reset_high_water_mark
_reset_high_water_mark()
before = _high_water_mark()
with peak_resident_memory() as peak:
    zo2 = ZO2.from_pretrained(sys.argv[1], ZO2Config(store="disk", store_dir=sys.argv[2], working_device="cpu"))
block = zo2.store.layouts[0].size
print(peak.peak - before, block, zo2.model.get_input_embeddings().weight.nbytes)
"""


@pytest.mark.alone
def test_a_directory_is_never_in_memory(tmp_path):
    """Reading it: three blocks, embedding and head, and 64 MB at most, of 10 blocks of 15 MB."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8, tie_word_embeddings=False
    )
    with no_init_weights():
        model = LlamaForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "base", max_shard_size="60MB")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "base"), str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    peak, block, embedding = map(int, done.stdout.split())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert peak <= 3 * block + 2 * embedding + 64e6 < 0.8 * whole


def arguments(folder, **words):
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": LR,
            "lr_scheduler_type": "linear",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        | words,
    )


def test_the_trainer_of_transformers_drives_it(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS[:1].repeat(8, 1)]
    trainer = ZO2Trainer(
        make(),
        arguments(tmp_path / "runs", seed=1),
        zo2_config=ZO2Config(store="disk", store_dir=str(tmp_path / "store"), weight_decay=DECAY, working_device="cpu"),
        train_dataset=rows,
        eval_dataset=rows,
    )
    assert isinstance(trainer, Trainer)
    trainer.train()
    updates = trainer.zo2.journal
    assert [each.lr for each in updates] == pytest.approx([LR, 0.75 * LR, 0.5 * LR, 0.25 * LR])
    model, ids = make().eval(), IDS[:1].repeat(2, 1)
    optimizer = MeZO(model.named_parameters(), weight_decay=DECAY)
    for update in updates:
        optimizer.param_groups[0]["lr"] = update.lr
        optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        assert optimizer.last.projected_grad == update.g
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-6)
    trainer.save_model(str(tmp_path / "out"))
    trainer.save_model(str(tmp_path / "out"))  # as a Trainer does at each checkpoint
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True, use_safetensors=True, trust_remote_code=False)
    assert all(torch.equal(value, again.get_parameter(key)) for key, value in model.named_parameters())


def test_the_trainer_refuses_what_there_is_none_of(tmp_path):
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 2; expected 1.*micro_batches"):
        ZO2Trainer(make(), arguments(tmp_path, gradient_accumulation_steps=2), zo2_config=ZO2Config())


def test_a_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    streamed(make()).save_pretrained(tmp_path / "out", tokenizer)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
