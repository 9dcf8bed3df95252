"""Language models whose feed-forward networks are cut into experts, of which a few run for each token.

This file needs nothing but transformers. It is written beside the weights of a factorised model, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads them anywhere.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PLAIN = ("llama", "mistral", "qwen2")  # their mlp is gate, up and down without biases
PREFIX = "fewer_factor_llm_"


class FactorizedMLP(nn.Module):
    """y = (N / K) sum of E_i(x) over the K experts with the largest router logits; with K = N the dense network, no router asked.

    Expert i holds the neurons `expert_ids[i]` of the dense network in all three matrices, so that the experts' sum is that network.

    Args:
        hidden_size, intermediate_size: H and I; I is a multiple of N.
        num_experts, top_k: N and K.
        hidden_act: the gate's activation.

    Attributes:
        router: Linear(H, N).
        gate_up: [N, 2 I/N, H], each expert's rows of the gate first: an expert is a view.
        down: [N, H, I/N].
        expert_ids: [N, I/N] neurons of the dense network.
        last_pa_loss: of the last batch, where a `FactorLoss` watches.
    """

    def __init__(self, hidden_size, intermediate_size, num_experts, top_k, hidden_act="silu"):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.act_fn = ACT2FN[hidden_act]
        self.router = nn.Linear(hidden_size, num_experts)
        width = intermediate_size // num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.register_buffer("expert_ids", torch.arange(intermediate_size).reshape(num_experts, width))
        self.last_pa_loss = None

    def expert(self, number, x, gate_up=None, down=None):
        """E_number(x), [..., H] -> [..., H]; by other weights where some are given (a teacher's)."""
        gate, up = F.linear(x, (self.gate_up if gate_up is None else gate_up)[number]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, (self.down if down is None else down)[number])

    def route(self, x):
        """[T, H] -> [T, K], the experts of each token, the largest logit first."""
        return self.router(x).topk(self.top_k, dim=-1).indices

    def forward(self, x):
        """[..., H] -> [..., H]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.top_k == self.num_experts:
            y = sum(self.expert(number, rows) for number in range(self.num_experts))
        else:
            y = self._routed(rows, self.route(rows)) * (self.num_experts / self.top_k)
        return y.reshape(x.shape)

    def _routed(self, rows, chosen):
        """The chosen experts' sum: each expert sees its own tokens and no others."""
        if len(rows) == 1:  # one token while writing: views of the weights, nothing gathered; a vector's product is quicker than a row's
            return sum(self.expert(number, rows[0]) for number in chosen[0].tolist())
        y = torch.zeros_like(rows)
        for number in range(self.num_experts):
            tokens = (chosen == number).any(-1).nonzero().squeeze(1)
            y.index_add_(0, tokens, self.expert(number, rows.index_select(0, tokens)))
        return y


class Factorised:
    """Makes the plain model, then puts experts in place of the feed-forward networks of `factor_layers`."""

    def __init__(self, config):
        super().__init__(config)
        for number in config.factor_layers:
            layer = self.model.layers[number]
            layer.mlp = FactorizedMLP(config.hidden_size, config.intermediate_size, config.num_experts, config.top_k, config.hidden_act)
        self.post_init()


def _classes(plain):
    """The config and the model of a plain type, with the experts' numbers in the config."""
    plain_config = CONFIG_MAPPING[plain]
    plain_model = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]
    name = plain_model.__name__.removesuffix("ForCausalLM")
    words = {
        "__module__": __name__,
        "__doc__": f"{plain_config.__name__} with `num_experts` and `top_k`, and the layers (`factor_layers`) that are cut into experts.",
        "__annotations__": {"num_experts": int, "top_k": int, "factor_layers": list[int]},
        "model_type": f"{PREFIX}{plain}",
        "num_experts": 4,
        "top_k": 2,
        "factor_layers": (),
    }
    config = strict(type(f"Factor{name}Config", (plain_config,), words))
    about = (
        f"{plain_model.__name__} with experts of which some run for each token in place of feed-forward networks; `factorize` makes one."
    )
    words = {"__module__": __name__, "__doc__": about, "config_class": config}
    model = type(f"Factor{name}ForCausalLM", (Factorised, plain_model), words)
    config.register_for_auto_class("AutoConfig")
    model.register_for_auto_class("AutoModelForCausalLM")  # `save_pretrained` writes this file beside the weights
    return config, model


FAMILIES = {plain: _classes(plain) for plain in PLAIN}
globals().update({made.__name__: made for family in FAMILIES.values() for made in family})
FactorLlamaConfig, FactorLlamaForCausalLM = FAMILIES["llama"]

for _config, _model in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
