"""T1: fields go to modes once, every layer works on the lowest modes, and only who asks for a field comes back."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_positive, check_whole
from fewer.files import made_whole, read_json, read_weights
from fewer.signals.transform_once.modes import Modes
from fewer.signals.transform_once.transforms import BASES, Basis, apply_matrices, basis_matrix, check_modes

Activation = Literal["gelu", "sin"]
Init = Literal["vp-first", "vp-all", "naive", "kaiming"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "sin": torch.sin}
INITS = ("vp-first", "vp-all", "naive", "kaiming")
HEAD = 128  # hidden width of the head
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def vp_std(
    n: int | Sequence[int], m: int | Sequence[int], fan_in: int = 1, kind: Literal["diagonal", "full"] = "diagonal",
    transform: Literal["dct", "rfft"] = "dct",
) -> float:  # fmt: skip
    """The standard deviation of weights on m of n modes that keeps the total variance of white fields.

    A diagonal map (each mode by itself) needs variance n / m, a full m x m one n / m^2, each over the channels that are summed: cutting n
    coefficients to m lost the rest. Of complex weights on an rfft, real and imaginary part get half of it each.

    Args:
        n, m: points and modes; of several axes their products count.
        fan_in: channels that are mixed.

    Source: arXiv 2211.14453, variance-preserving weights.

    Examples:
        >>> round(vp_std(1000, 100) ** 2, 6), round(vp_std((32, 32), (8, 8), fan_in=8) ** 2, 6)
        (10.0, 2.0)
    """
    check_choice(("diagonal", "full"), kind=kind)
    check_choice(("dct", "rfft"), transform=transform)
    points, modes = (math.prod(each) if isinstance(each, Sequence) else each for each in (n, m))
    check_whole(n=points, m=modes, fan_in=fan_in)
    variance = points / (modes if kind == "diagonal" else modes**2) / fan_in
    return math.sqrt(variance / (2 if transform == "rfft" else 1))


class T1Layer(nn.Module):
    """z + mix_d(... mix_1(act(z W))): channels mixed mode by mode, then modes along each axis, channel by channel.

    It takes and gives [m_1, ..., m_d, B, D], where both products are batched ones of matrices.

    Args:
        n_modes: m_1, ..., m_d.
        channels: D.
        activation: "gelu" or "sin".
        std: of the channel weights W [m..., D_in, D_out]; those of an axis [D, m, m'] have 1/sqrt(m).
    """

    def __init__(
        self, n_modes: Sequence[int], channels: int, activation: Activation = "gelu", std: float = 1.0, residual: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.channel_mixing = nn.Parameter(std * torch.randn(*n_modes, channels, channels))
        self.axis_mixing = nn.ParameterList(torch.randn(channels, m, m) / math.sqrt(m) for m in n_modes)

    def forward(self, z: Float[Tensor, "m B D"], mask: Tensor | None = None) -> Float[Tensor, "m B D"]:
        shape = z.shape
        t = torch.bmm(z.reshape(-1, *shape[-2:]), self.channel_mixing.flatten(0, -3)).reshape(shape)
        t = ACTIVATIONS[self.activation](t).movedim(-1, 0)  # [D, m..., B]
        for i, mixing in enumerate(self.axis_mixing):  # sum_x t[..., x, ...] A[x, x', c]
            t = t.movedim(i + 1, -1)
            t = torch.bmm(t.reshape(t.shape[0], -1, t.shape[-1]), mixing).reshape(t.shape).movedim(-1, i + 1)
        t = t.movedim(0, -1)
        if mask is not None:
            t = t * mask.reshape(*mask.shape, 1, 1)
        return z + t


class T1(nn.Module):
    """Transform Once: an operator on fields whose layers live on m_1 x ... x m_d real coefficients.

    Training: `to_modes` the data once (`ModeDataset`), `forward_modes`, and a `ModeLoss` on coefficients; nothing of the field's size is
    touched. Inference: `forward`, or `from_modes` at any resolution.

    Args:
        n_modes: m_1, ..., m_d, d = 1, 2 or 3, or one that `modes` says.
        hidden_channels: D.
        in_channels, out_channels: of the fields [B, c, n_1, ..., n_d].
        n_layers: L.
        resolution: n_1, ..., n_d of the data.
        basis: "dct" (the paper's), or "fourier" for periodic fields (ours).
        activation: "gelu" or "sin".
        init: "vp-first" (variance-preserving first layer, then 1/sqrt(D)), "vp-all", "naive" (1/D^2) or "kaiming" (1/sqrt(D)).
        head_scale: standard deviation of the head's weights.
        positional_embedding: whether each axis' coordinates (0 to 1) are input channels.
        modes: from `select_modes`; its basis and block are taken, and modes outside its list stay zero.

    Raises:
        ValueError: more modes than points, fewer than 1, another number of axes, or unknown words.

    Source: arXiv 2211.14453, and the released settings.

    Examples:
        >>> model = T1((6, 6), 8, resolution=(16, 16))
        >>> x = torch.randn(2, 1, 16, 16)
        >>> z = model.forward_modes(model.to_modes(x))
        >>> z.shape, model(x).shape, model.from_modes(z, (64, 64)).shape
        (torch.Size([2, 1, 6, 6]), torch.Size([2, 1, 16, 16]), torch.Size([2, 1, 64, 64]))
    """

    basis_id: Tensor
    mask: Tensor | None

    def __init__(
        self, n_modes: Sequence[int], hidden_channels: int, in_channels: int = 1, out_channels: int = 1, n_layers: int = 4, *,
        resolution: Sequence[int], basis: Basis = "dct", activation: Activation = "gelu", init: Init = "vp-first",
        head_scale: float = 1e-2, positional_embedding: bool = True, modes: Modes | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice(BASES, basis=basis)
        check_choice(list(ACTIVATIONS), activation=activation)
        check_choice(INITS, init=init)
        check_positive(head_scale=head_scale)
        check_whole(hidden_channels=hidden_channels, in_channels=in_channels, out_channels=out_channels)
        check_whole(least=0, n_layers=n_layers)
        if modes is not None:
            n_modes, basis = modes.n_modes, modes.basis
        self.n_modes, self.resolution = tuple(n_modes), tuple(resolution)
        self.basis: Basis = basis
        for name, sizes in (("n_modes", self.n_modes), ("resolution", self.resolution)):
            for i, size in enumerate(sizes):
                check_whole(optional=(), **{f"{name}[{i}]": size})
        if len(self.n_modes) not in (1, 2, 3):
            raise ValueError(f"n_modes is {self.n_modes}; expected 1, 2 or 3 axes")
        check_modes(self.n_modes, self.resolution)
        self.in_channels, self.out_channels, self.hidden_channels = in_channels, out_channels, hidden_channels
        self.config = {
            "n_modes": self.n_modes, "hidden_channels": hidden_channels, "in_channels": in_channels, "out_channels": out_channels,
            "n_layers": n_layers, "resolution": self.resolution, "basis": basis, "activation": activation, "init": init,
            "head_scale": head_scale, "positional_embedding": positional_embedding,
        }  # fmt: skip
        self.positional_embedding = positional_embedding
        self.register_buffer("basis_id", torch.tensor(BASES.index(basis)))
        self.register_buffer("mask", None if modes is None or modes.index is None else modes.mask())
        axes = len(self.n_modes) if positional_embedding else 0
        self.lift = nn.Linear(in_channels + axes, hidden_channels)
        nn.init.zeros_(self.lift.bias)
        self.layers = self._make_layers(n_layers, activation, init)
        self.head_in = nn.Parameter(head_scale * torch.randn(hidden_channels, HEAD))
        self.head_out = nn.Parameter(head_scale * torch.randn(HEAD, out_channels))

    def _make_layers(self, n_layers: int, activation: Activation, init: Init) -> nn.ModuleList:
        return nn.ModuleList(T1Layer(self.n_modes, self.hidden_channels, activation, self._std(init, i)) for i in range(n_layers))

    def _std(self, init: Init, layer: int) -> float:
        """Of a layer's channel weights: the block is cut out once, so that only the first layer has a loss to make up for."""
        width = self.hidden_channels
        if init == "naive":
            return 1 / width**2
        if init == "vp-all" or (init == "vp-first" and layer == 0):
            return vp_std(self.resolution, self.n_modes, width)
        return 1 / math.sqrt(width)

    def to_modes(self, x: Float[Tensor, "B c n"]) -> Float[Tensor, "B c m"]:
        """The lowest modes of fields at the model's resolution."""
        axes = len(self.n_modes)
        if x.ndim != axes + 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, channels] and {axes} axes, as many as n_modes {self.n_modes}")
        if not x.dtype.is_floating_point:
            raise ValueError(f"x is {x.dtype}; expected real floating-point fields: give real and imaginary parts as channels")
        if tuple(x.shape[2:]) != self.resolution:
            raise ValueError(
                f"x has resolution {tuple(x.shape[2:])} and the model {self.resolution}; expected the model's: resize with "
                f"spectral_resize(x, {self.resolution}), or make T1 with resolution={tuple(x.shape[2:])}"
            )
        z = apply_matrices(x, self._matrices(self.resolution, x.dtype, str(x.device)))
        return z if self.mask is None else z * self.mask

    def forward_modes(self, z: Float[Tensor, "B c m"]) -> Float[Tensor, "B c m"]:
        """All layers and the head, on modes alone."""
        self._check_modes(z, self.in_channels, "call to_modes")
        h = self._lifted(z)
        for layer in self.layers:
            h = layer(h, self.mask)
        return (torch.sin(h @ self.head_in) @ self.head_out).movedim((-2, -1), (0, 1))

    def _lifted(self, z: Tensor) -> Tensor:
        """[m..., B, D]: the linear map after the transform, on the c_in inputs; coordinates and the bias are constant modes of their own."""
        weight = self.lift.weight
        h = z.movedim((0, 1), (-2, -1)) @ weight[:, : self.in_channels].T
        ones, coordinates = constant_modes(self.basis, self.n_modes, self.resolution, z.dtype, str(z.device))
        fixed = ones[..., None] * self.lift.bias
        if self.positional_embedding:
            fixed = fixed + coordinates @ weight[:, self.in_channels :].T
        if self.mask is not None:
            fixed = fixed * self.mask[..., None]
        return h + fixed.unsqueeze(-2)

    def from_modes(self, z: Float[Tensor, "B c m"], resolution: Sequence[int] | None = None) -> Float[Tensor, "B c n"]:
        """Fields at any resolution of at least n_modes: the basis functions at its points."""
        self._check_modes(z, z.shape[1] if z.ndim > 1 else 1, "modes come from forward_modes or to_modes")
        points = self.resolution if resolution is None else tuple(resolution)
        check_modes(self.n_modes, points)
        return apply_matrices(z, [each.T for each in self._matrices(points, z.dtype, str(z.device))])

    def forward(self, x: Float[Tensor, "B c n"]) -> Float[Tensor, "B c n"]:
        return self.from_modes(self.forward_modes(self.to_modes(x)))

    def _check_modes(self, z: Tensor, channels: int, how: str) -> None:
        if tuple(z.shape[1:]) != (channels, *self.n_modes) or not z.dtype.is_floating_point:
            raise ValueError(
                f"z is {z.dtype} of shape {tuple(z.shape)}; expected real numbers [B, {channels}, {', '.join(map(str, self.n_modes))}]: {how}"
            )

    def _matrices(self, points: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
        return [basis_matrix(self.basis, m, p, n, dtype, device) for m, p, n in zip(self.n_modes, points, self.resolution, strict=True)]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *words: Any) -> None:
        found = state.get(prefix + "basis_id")
        if found is not None and int(found) != BASES.index(self.basis):
            raise ValueError(
                f"the weights are for basis {BASES[int(found)]!r} and the model's is {self.basis!r}; expected the same: make T1 with it"
            )
        if prefix + "mask" in state and self.mask is None:
            self.mask = torch.ones(self.n_modes, dtype=torch.bool)
        super()._load_from_state_dict(state, prefix, *words)

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> None:
        """Weights as safetensors and the configuration as JSON, into a new directory."""
        from safetensors.torch import save_file

        with made_whole(directory, overwrite, option="directory") as folder:
            save_file({name: each.contiguous() for name, each in self.state_dict().items()}, folder / WEIGHTS)
            words = {"model": type(self).__name__, **self.config}
            (folder / CONFIG).write_text(json.dumps(words, indent=1) + "\n", encoding="utf8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """The model that `save_pretrained` wrote.

        Raises:
            FileNotFoundError, ValueError: a file is missing, cut off, of another class, or does not fit.
        """
        folder = Path(directory)
        words = read_json(folder / CONFIG)
        name = words.pop("model", None)
        if name != cls.__name__:
            raise ValueError(f"{folder / CONFIG} is of a {name}; expected {cls.__name__}: load it with {name}.from_pretrained")
        try:
            model = cls(**words)
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG} does not fit ({error}); expected what save_pretrained writes: write it again") from error
        weights = read_weights(folder / WEIGHTS)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit {CONFIG} ({' '.join(str(error).split())[:200]}); write both again"
            ) from error
        return model.to(weights["lift.weight"].dtype)


@functools.lru_cache(64)
@torch.inference_mode(False)  # as basis_matrix
def constant_modes(
    basis: Basis, n_modes: tuple[int, ...], resolution: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """The modes of the constant 1 [m...] and of each axis' coordinates, linspace(0, 1, n) along it, [m..., d]."""
    bases = [basis_matrix(basis, m, n, n, torch.float64) for m, n in zip(n_modes, resolution, strict=True)]
    flat = [each.sum(1) for each in bases]
    sloped = [each @ torch.linspace(0, 1, n, dtype=torch.float64) for each, n in zip(bases, resolution, strict=True)]

    def outer(parts: list[Tensor]) -> Tensor:
        return functools.reduce(lambda a, b: a[..., None] * b, parts)

    coordinates = [outer([sloped[j] if j == i else flat[j] for j in range(len(flat))]) for i in range(len(flat))]
    return outer(flat).to(device, dtype), torch.stack(coordinates, -1).to(device, dtype)


class T1UNet(T1):
    """T1+: one T1 layer, then a U-Net that treats the block of modes as an image, for two-dimensional fields (or one and three).

    Three levels of 2^e, 2^(e+1) and 2^(e+2) channels with two convolutions of 3 each, GELU, average pooling, nearest upsampling and skips by
    concatenation.

    Args:
        exponent: e, 4 to 6 in the released experiments.
        words: as T1 takes them, without `n_layers`.

    Examples:
        >>> T1UNet((8, 8), 4, resolution=(16, 16))(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(self, n_modes: Sequence[int], hidden_channels: int, *args: Any, exponent: int = 4, **words: Any) -> None:
        check_whole(exponent=exponent)
        self.exponent = exponent
        super().__init__(n_modes, hidden_channels, *args, **words)
        self.config["exponent"] = exponent

    def _make_layers(self, n_layers: int, activation: Activation, init: Init) -> nn.ModuleList:
        unet = UNet(len(self.n_modes), self.hidden_channels, 2**self.exponent)
        return nn.ModuleList([T1Layer(self.n_modes, self.hidden_channels, activation, self._std(init, 0)), unet])


class UNet(nn.Module):
    """A plain U-Net of three levels on [m..., B, D]."""

    def __init__(self, axes: int, channels: int, width: int) -> None:
        super().__init__()
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]

        def pair(first: int, last: int) -> nn.Sequential:
            return nn.Sequential(convolution(first, last, 3, padding=1), nn.GELU(), convolution(last, last, 3, padding=1), nn.GELU())

        self.down = nn.ModuleList([pair(channels, width), pair(width, 2 * width), pair(2 * width, 4 * width)])
        self.up = nn.ModuleList([pair(6 * width, 2 * width), pair(3 * width, width)])
        self.out = convolution(width, channels, 1)
        self.pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]

    def forward(self, z: Float[Tensor, "m B D"], mask: Tensor | None = None) -> Float[Tensor, "m B D"]:
        x = z.movedim((-2, -1), (0, 1))
        levels = [self.down[0](x)]
        for level in self.down[1:]:
            levels.append(level(self.pool(levels[-1], 2, ceil_mode=True)))
        x = levels.pop()
        for level in self.up:
            skip = levels.pop()
            x = level(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], 1))
        x = self.out(x).movedim((0, 1), (-2, -1))
        return x if mask is None else x * mask.reshape(*mask.shape, 1, 1)
