"""The feed-forward network itself: a ReLU router with RMS norm, and narrow experts of which each token uses few (section 3.1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_positive, check_whole
from fewer.language._shared.experts import of_one_token, over_active_experts, triton_kernel

Kernel = Literal["auto", "dense", "sparse", "union", "triton"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}
# Where a loop over active experts is quicker than the dense products, as measured on a processor core: at most half of the experts, each
# large enough (entries of one of its maps) or for tokens enough that multiplying takes longer than calling does.
MOST_ACTIVE, LARGE, LARGE_WITH_TOKENS = 0.5, 2**15, 2**18


def root_mean_square_norm(positive: Float[Tensor, "... E"], eps: float = 1e-5) -> Float[Tensor, "... E"]:
    """A1 / sqrt(mean_i(A1_i^2) + eps), the mean over all experts, inactive ones too; in float32 at least."""
    wide = positive.to(torch.promote_types(positive.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class RouterNorm(nn.Module):
    """A0 -> A = w * RMSNorm(ReLU(A0)): exactly 0 where A0 <= 0. `weight` w is [E]; it may become negative and does not decide who is active."""

    def __init__(self, num_experts: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(num_experts)), eps

    def forward(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        return (self.weight * root_mean_square_norm(F.relu(logits), self.eps)).to(logits.dtype)


class BlockFFN(nn.Module):
    """A feed-forward network of experts with a differentiable router: y = sum_i A_i(x) W_down_i act(W_up_i x), over the active experts alone.

    Args:
        hidden_size: d, entries of a token's vector.
        num_experts: E.
        expert_size: d_e, channels of an expert; E d_e is about the width of a dense network.
        eps: of the router's norm.
        activation: of the experts: silu, relu, gelu or tanh. They have no gate on purpose: with one, tokens activate many more experts.
        kernel: how the experts are multiplied; all ways give the same up to rounding.

            - "dense": all experts, as one wide network (training, long prompts);
            - "sparse": each token by itself, its own experts alone;
            - "union": all tokens together, the experts that any of them needs (a draft that is verified);
            - "triton": the same on a GPU (silu only; no gradients);
            - "auto": "union" on a CPU where it is quicker, else "dense".

    Attributes:
        router_proj, router_norm, up_proj [E d_e, d], down_proj [d, E d_e]: the released names and shapes. down_proj is kept so that an
            expert's columns lie together: an expert is one contiguous piece of each map.
        router_logits: A0 [..., E] of the last pass, with its graph, where `output_router_logits` is set; never kept in copies or files.

    Raises:
        ValueError: sizes below 1, an unknown activation or kernel.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer = BlockFFN(hidden_size=16, num_experts=8, expert_size=4)
        >>> layer.output_router_logits = True
        >>> layer(torch.randn(2, 5, 16)).shape, layer.router_logits.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 8]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        expert_size: int,
        eps: float = 1e-5,
        activation: str = "silu",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_whole(hidden_size=hidden_size, num_experts=num_experts, expert_size=expert_size)
        check_positive(eps=eps)
        check_choice(ACTIVATIONS, activation=activation)
        check_choice(get_args(Kernel), kernel=kernel)
        if kernel == "triton" and activation != "silu":
            raise ValueError(f"activation is {activation!r}; expected 'silu' with the triton kernel: use another kernel")
        self.hidden_size, self.num_experts, self.expert_size = hidden_size, num_experts, expert_size
        self.activation, self.kernel = activation, kernel
        self.router_proj = nn.Linear(hidden_size, num_experts, bias=False)
        self.router_norm = RouterNorm(num_experts, eps)
        self.up_proj = nn.Parameter(torch.empty(num_experts * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts * expert_size, hidden_size).T)
        self.output_router_logits = False
        self.router_logits: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Matrices normal(0, std), the norm's weight 1."""
        for matrix in (self.router_proj.weight, self.up_proj, self.down_proj):
            nn.init.normal_(matrix, std=std)
        nn.init.ones_(self.router_norm.weight)

    def active(self, logits: Float[Tensor, "... E"]) -> Bool[Tensor, "... E"]:
        """Which experts a token uses: A1 > 0, whatever the sign of w. (A NaN counts as active, so that it is not lost.)"""
        return ~(logits <= 0)

    def gates(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        """A, exactly 0 for inactive experts."""
        return self.router_norm(logits)

    def forward(self, hidden_states: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """
        Args:
            hidden_states: [..., d], the dtype of the weights.

        Raises:
            ValueError: the last dimension is not d.
            RuntimeError: the triton kernel was asked for where Triton cannot run.
        """
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states is {tuple(hidden_states.shape)}; expected a last dimension of {self.hidden_size}")
        logits = self.router_proj(hidden_states)
        self.router_logits = logits if self.output_router_logits else None
        tokens, flat = hidden_states.reshape(-1, self.hidden_size), logits.reshape(-1, self.num_experts)
        return self.mix(tokens, self.gates(flat), self.active(flat)).view(hidden_states.shape)

    def mix(
        self, x: Float[Tensor, "T d"], gates: Float[Tensor, "T E"], active: Bool[Tensor, "T E"], kernel: Kernel | None = None
    ) -> Float[Tensor, "T d"]:
        """The experts' outputs, each times its gate, summed; gates are 0 where an expert is not active."""
        chosen = kernel or self.kernel
        match self._quickest(x, active) if chosen == "auto" else chosen:
            case "dense":
                hidden = ACTIVATIONS[self.activation](F.linear(x, self.up_proj)).unflatten(-1, (self.num_experts, self.expert_size))
                return F.linear((hidden * gates[..., None]).flatten(-2), self.down_proj)
            case "triton":
                return triton_kernel(self.up_proj)(x, gates, active, *self.blocks())
            case "sparse" if len(x) != 1:
                return torch.cat(
                    [self.mix(*token, "union") for token in zip(x.split(1), gates.split(1), active.split(1), strict=True)] or [x]
                )
        (up, down), act = self.blocks(), ACTIVATIONS[self.activation]
        if len(x) == 1 and x.dtype == up.dtype in (torch.float32, torch.float64) and self._plain(x):
            return of_one_token(x, gates, active, up, act, down)
        return over_active_experts(x, gates, active, lambda x, expert: act(x @ up[expert].T), down)

    def blocks(self) -> tuple[Float[Tensor, "E e d"], Float[Tensor, "E e d"]]:
        """(up, down): each expert's weights as one contiguous piece. What has laid down_proj out otherwise (a file that was read) is undone."""
        if not self.down_proj.T.is_contiguous():
            self.down_proj.data = self.down_proj.data.T.contiguous().T
        shape = (self.num_experts, self.expert_size, self.hidden_size)
        return self.up_proj.view(shape), self.down_proj.T.view(shape)

    def _quickest(self, x: Tensor, active: Tensor) -> Kernel:
        entries = self.expert_size * self.hidden_size
        if not self._plain(x) or (entries < LARGE and entries * len(x) < LARGE_WITH_TOKENS):
            return "dense"
        return "union" if active.any(0).float().mean() <= MOST_ACTIVE else "dense"

    def _plain(self, x: Tensor) -> bool:
        """Whether the CPU computes this in the tensors' own type and nobody asks for a gradient."""
        learns = torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in self.parameters()))
        return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not learns

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"router_logits": None}  # it has a graph, which no copy can have

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_ungated(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size} -> {self.num_experts} x {self.expert_size} -> {self.hidden_size}, {self.activation}, kernel={self.kernel}"
        )


def check_ungated(names: Any, prefix: str = "") -> None:
    """ValueError where weights are those of gated experts or of a gated network."""
    gated = sorted(name for name in names if name.startswith(prefix) and ("gate_proj" in name or "gate_up_proj" in name))
    if gated:
        raise ValueError(f"the weights hold {gated[0]}, which is of gated experts; expected experts without a gate: up_proj and down_proj")
