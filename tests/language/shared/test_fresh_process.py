"""What the area's methods have written is read by another process, which has none of their state."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM

from fewer.language import S2FTConfig, calibrate, get_s2ft_model, prune
from fewer.tasks import micro_lm

IDS = torch.arange(1, 25).reshape(2, 12)
CODE = """
import torch
import fewer.language.cfsp.pruning
from fewer.language import S2FTModel
from fewer.tasks import micro_lm
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 25).reshape(2, 12)
pruned = AutoModelForCausalLM.from_pretrained("pruned", dtype="auto")
assert pruned.dtype == torch.bfloat16
base = AutoModelForCausalLM.from_pretrained("base")
adapted = S2FTModel.from_pretrained(base, "adapter")
torch.save([model(input_ids=ids).logits.detach() for model in (pruned.float(), adapted)], "logits.pt")
"""


def test_a_pruned_model_and_an_adapter_saved_after_merging_are_read_by_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = micro_lm().to(torch.bfloat16)
    prune(model, calibrate(model, [IDS]), 0.5, multiple_of=16)
    model.save_pretrained("pruned")
    # a cast model's own angles of rotation are rounded, those of one that is read are not
    pruned = AutoModelForCausalLM.from_pretrained("pruned", dtype="auto").float()
    micro_lm().save_pretrained("base")
    wrapped = get_s2ft_model(micro_lm(), S2FTConfig(d_ratio=0.1))
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=5.0).step()
    merged = wrapped.merge_and_unload()
    wrapped.save_pretrained("adapter")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load("logits.pt", weights_only=True)
    with torch.no_grad():
        assert not torch.allclose(merged(input_ids=IDS).logits, micro_lm()(input_ids=IDS).logits, atol=1e-3)
        for each, mine in zip(found, (pruned, merged), strict=True):
            assert torch.allclose(each, mine(input_ids=IDS).logits, atol=1e-5)
