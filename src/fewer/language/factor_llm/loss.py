"""The prior-approximate loss: which experts come nearest to the dense network, as a pseudo-label for the router.

Source: FactorLLM, arXiv 2408.11855, section 3.3. d_i = mean_h (E_i(x) - (K/N) F(x))^2; t = 1 for the K smallest; q = softmax(t);
L_PA = sum_i p_i log(p_i / q_i) with p = softmax(router logits), mean over tokens, summed over layers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.checks import check_choice, check_not_negative
from fewer.language.factor_llm.model import FactorizedMLP

Label = Literal["individual", "subset"]
PALoss = Literal["kl", "ce"]
CLIP = 1e-7  # of both distributions
MOST = 8  # experts, whose subsets can all be tried


class Teacher(NamedTuple):
    """The experts' weights as they were cut from the dense network: all of them together are F."""

    gate_up: Tensor
    down: Tensor


def experts_of(model: Any) -> list[FactorizedMLP]:
    """The factorised networks of a model, first to last; ValueError where there is none."""
    found = [module for module in model.modules() if isinstance(module, FactorizedMLP)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts; expected a factorised model: factorize it first")
    return found


@torch.no_grad()
def expert_outputs(mlp: FactorizedMLP, x: Float[Tensor, "T H"], teacher: Teacher | None = None) -> Float[Tensor, "N T H"]:
    """E_i(x) of all experts, in float32 or better (ranks in bfloat16 are noise); a teacher's where one is given."""
    weights: Any = teacher or (None, None)
    outputs = torch.stack([mlp.expert(number, x, *weights) for number in range(mlp.num_experts)])
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def individual_labels(outputs: Float[Tensor, "N T H"], dense: Float[Tensor, "T H"], top_k: int) -> Bool[Tensor, "T N"]:
    """The K experts with the smallest d_i, those that resemble F most."""
    distance = (outputs - top_k / len(outputs) * dense).square().mean(-1).T
    return _marked(distance.argsort(dim=-1, stable=True)[:, :top_k], len(outputs))


def subset_labels(outputs: Float[Tensor, "N T H"], dense: Float[Tensor, "T H"], top_k: int) -> Bool[Tensor, "T N"]:
    """The K experts whose scaled sum is nearest to F: || (N/K) sum_S E_i - F ||^2 over all subsets, by the experts' Gram matrix."""
    scale = len(outputs) / top_k
    rows = outputs.transpose(0, 1)
    gram, with_dense = rows @ rows.transpose(1, 2), (rows @ dense[..., None]).squeeze(-1)
    subsets = torch.tensor(list(itertools.combinations(range(len(outputs)), top_k)), device=outputs.device)
    chosen = _marked(subsets, len(outputs)).to(outputs.dtype)  # [subsets, N]
    error = scale**2 * torch.einsum("sn,tnm,sm->ts", chosen, gram, chosen) - 2 * scale * with_dense @ chosen.T
    return _marked(subsets[error.argmin(-1)], len(outputs))


LABELS = {"individual": individual_labels, "subset": subset_labels}


def _marked(places: Tensor, experts: int) -> Bool[Tensor, "T N"]:
    return torch.zeros(len(places), experts, dtype=torch.bool, device=places.device).scatter(1, places, True)


def prior_approximate_loss(logits: Float[Tensor, "T N"], marked: Bool[Tensor, "T N"], kind: PALoss = "kl") -> Float[Tensor, ""]:
    """L_PA of a layer, the mean over tokens: KL(p || softmax(t)), or with "ce" the cross-entropy to t / K.

    >>> marked = torch.tensor([[True, True, False, False]])
    >>> round(prior_approximate_loss(torch.zeros(1, 4), marked).item(), 5)
    0.12011
    """
    t = marked.to(torch.promote_types(logits.dtype, torch.float32))
    p = logits.to(t.dtype).softmax(-1).clamp(CLIP, 1 - CLIP)
    if kind == "ce":
        return -(t / t.sum(-1, keepdim=True) * p.log()).sum(-1).mean()
    q = t.softmax(-1).clamp(CLIP, 1 - CLIP)
    return (p * (p / q).log()).sum(-1).mean()


def balance_term(logits: Float[Tensor, "T N"], top_k: int) -> Float[Tensor, ""]:
    """The released code's auxiliary term: mean over tokens and experts of (in the top K) x softmax. It flattens the router."""
    return (_marked(logits.topk(top_k, dim=-1).indices, logits.shape[-1]) * logits.softmax(-1)).mean()


class FactorLoss:
    """L = L_CE + pa_weight sum L_PA (+ balance_weight sum L_b) of a factorised model in training; a context that watches it.

    L_CE reaches the experts and never the router (the choice is hard); L_PA reaches the router and nothing else. The teachers, the dense
    networks as they are when this is made, are kept here and freed with it.

    Args:
        model: what `factorize` gave, its experts as they were cut.
        pa_loss: "kl" (the paper's) or "ce".
        label: "individual" (the paper's) or "subset", what the layer's error asks for; at most 8 experts.
        par_input: "student" judges on the inputs that the factorised model's own networks get, "teacher" on those of the dense model,
            for which a pass of it is made.

    Attributes:
        inputs: number of a network -> its inputs [T, H] in the last pass in training mode, until the loss is taken.
        teachers: the dense networks' weights, an entry a network.

    Raises:
        ValueError: a choice or a weight that cannot be; in a call no pass in training mode went before.

    Examples:
        >>> from fewer.language.factor_llm import factorize
        >>> from fewer.tasks import micro_lm
        >>> model, ids = factorize(micro_lm(), 4, 2).train(), torch.arange(24).reshape(2, 12)
        >>> with FactorLoss(model) as loss_of:
        ...     loss_of(model(ids, labels=ids)).backward()
        >>> model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0
        tensor(True)
    """

    def __init__(
        self,
        model: Any,
        pa_weight: float = 0.05,
        balance_weight: float = 0.0,
        pa_loss: PALoss = "kl",
        label: Label = "individual",
        par_input: Literal["student", "teacher"] = "student",
    ) -> None:
        check_not_negative(pa_weight=pa_weight, balance_weight=balance_weight)
        check_choice(get_args(PALoss), pa_loss=pa_loss)
        check_choice(get_args(Label), label=label)
        check_choice(("student", "teacher"), par_input=par_input)
        self.model, self.experts = model, experts_of(model)
        if label == "subset" and self.experts[0].num_experts > MOST:
            raise ValueError(
                f"label is 'subset' and there are {self.experts[0].num_experts} experts; expected at most {MOST}: use 'individual'"
            )
        self.pa_weight, self.balance_weight, self.label, self.par_input = pa_weight, balance_weight, label, par_input
        self.pa_loss: PALoss = pa_loss
        self.teachers = [Teacher(mlp.gate_up.detach().clone(), mlp.down.detach().clone()) for mlp in self.experts]
        self.inputs: dict[int, Tensor] = {}
        self._words: dict[str, Any] = {}
        self._hooks = [mlp.register_forward_pre_hook(functools.partial(self._see, number)) for number, mlp in enumerate(self.experts)]
        self._hooks.append(model.register_forward_pre_hook(self._see_words, with_kwargs=True))

    def __enter__(self) -> FactorLoss:
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self.teachers, self.inputs, self._words = [], {}, {}

    def _see(self, number: int, _: Any, args: tuple[Tensor, ...]) -> None:
        if self.model.training:
            (x,) = args
            self.inputs[number] = x.detach().reshape(-1, x.shape[-1])

    def _see_words(self, _: Any, args: tuple[Any, ...], words: dict[str, Any]) -> None:
        names = ("input_ids", "attention_mask", "position_ids")
        self._words = dict(zip(names, args, strict=False)) | {name: value for name, value in words.items() if name in names}

    def __call__(self, outputs: Any, attention_mask: Tensor | None = None) -> Tensor:
        """The loss of the pass that gave `outputs` (with labels); `attention_mask` [B, S] leaves padding out of the routers' terms."""
        approximate, balance = self.router_losses(attention_mask)
        return outputs.loss + self.pa_weight * approximate + self.balance_weight * balance

    def router_losses(self, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum of L_PA over layers, sum of L_b) of the last pass in training mode; what has no weight is not computed and 0."""
        if len(self.inputs) < len(self.experts):
            raise ValueError("no pass in training mode went before; expected model.train() and a forward pass of it")
        if self.par_input == "teacher":
            self._dense_inputs()
        valid = slice(None) if attention_mask is None else attention_mask.reshape(-1).bool()
        approximate = balance = torch.zeros((), device=self.experts[0].down.device)
        for number, mlp in enumerate(self.experts):
            x = self.inputs[number][valid]
            if not len(x):
                continue
            logits = mlp.router(x)
            if self.pa_weight:
                own = prior_approximate_loss(logits, self.labels(number, x), self.pa_loss)
                cast(Any, mlp).last_pa_loss = own
                approximate = approximate + own
            if self.balance_weight:
                balance = balance + balance_term(logits, mlp.top_k)
        self.inputs.clear()
        return approximate, balance

    def labels(self, number: int, x: Float[Tensor, "T H"]) -> Bool[Tensor, "T N"]:
        """The pseudo-labels of a network for its inputs; they carry no gradient."""
        mlp = self.experts[number]
        outputs = expert_outputs(mlp, x)
        return LABELS[self.label](outputs, expert_outputs(mlp, x, self.teachers[number]).sum(0), mlp.top_k)

    @torch.no_grad()
    def _dense_inputs(self) -> None:
        """The networks' inputs in a pass of the dense model over the same batch."""
        self.inputs.clear()
        with as_dense(self.experts, self.teachers):
            self.model(**self._words, use_cache=False)


@contextlib.contextmanager
def as_dense(experts: list[FactorizedMLP], teachers: list[Teacher]) -> Iterator[None]:
    """The dense networks inside the block: the teachers' weights, all experts."""
    kept = [(mlp.gate_up.data, mlp.down.data, mlp.top_k) for mlp in experts]
    try:
        for mlp, teacher in zip(experts, teachers, strict=True):
            mlp.gate_up.data, mlp.down.data, mlp.top_k = teacher.gate_up, teacher.down, mlp.num_experts
        yield
    finally:
        for mlp, (gate_up, down, top_k) in zip(experts, kept, strict=True):
            mlp.gate_up.data, mlp.down.data, mlp.top_k = gate_up, down, top_k


@contextlib.contextmanager
def oracle(model: Any, label: Label = "individual") -> Iterator[None]:
    """Every token goes where its pseudo-label says inside the block, for which all experts run: what a perfect router would give."""
    experts = experts_of(model)
    try:
        for mlp in experts:
            mlp.route = lambda x, mlp=mlp: _by_label(mlp, x, label)
        yield
    finally:
        for mlp in experts:
            del mlp.route


def _by_label(mlp: FactorizedMLP, x: Tensor, label: Label) -> Tensor:
    outputs = expert_outputs(mlp, x)
    return LABELS[label](outputs, outputs.sum(0), mlp.top_k).nonzero()[:, 1].reshape(len(x), mlp.top_k)
