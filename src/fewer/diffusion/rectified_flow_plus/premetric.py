"""What a velocity is judged by: any m(a, b) >= 0 that is 0 only where a = b has the same minimiser, if the lines of the pairs do not cross.

With d elements and e = ||v - (z - x)||^2, the reached image being x_hat = x_t - t v:

    squared L2: e / d,   pseudo-Huber: (sqrt(e + c^2) - c) / d,
    LPIPS-Huber (configuration E): (1 - t) Huber + LPIPS(x_hat, x),   LPIPS-Huber-1/t (F): (1 - t) Huber + LPIPS(x_hat, x) / t.

Each is called as `premetric(v, x, z, t)` with tensors [B, *shape] and t [B], and gives one number a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_positive, check_whole
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.rectified_flow_plus.velocity import check_images, spread
from fewer.files import read_weights
from fewer.fitting import fit_steps
from fewer.tasks import conv_net

HUBER_PER_ELEMENT = 0.00054  # of the released code; the text's c = 0.00054 sqrt(d) is another one
UNIT_EPS = 1e-10
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # channels of its convolutions, 0 where it pools
VGG16_LAYERS = ("3", "8", "15", "22", "29")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of pixels from 0 to 1
VGG16_SIDE = 224


def squared_error(v: Float[Tensor, "B *shape"], x: Float[Tensor, "B *shape"], z: Float[Tensor, "B *shape"]) -> Float[Tensor, "B"]:
    """e = ||v - (z - x)||^2, summed over a sample's elements in float32 at least."""
    error = v - (z - x)
    return error.to(at_least_single(error.dtype)).flatten(1).square().sum(1)


class SquaredL2(nn.Module):
    """e / d, the loss of 2-rectified flow as it was."""

    name = "squared L2"

    def forward(self, v: Tensor, x: Tensor, z: Tensor, t: Tensor) -> Float[Tensor, "B"]:
        return squared_error(v, x, z) / v[0].numel()


class PseudoHuber(nn.Module):
    """(sqrt(e + c^2) - c) / d, whose gradient is at most 1 / d long.

    Args:
        huber_c: c; by default the released code's 0.00054 d (1.66 for CIFAR-10).
    """

    name = "pseudo-Huber"

    def __init__(self, huber_c: float | None = None) -> None:
        super().__init__()
        if huber_c is not None:
            check_positive(huber_c=huber_c)
        self.huber_c = huber_c

    def forward(self, v: Tensor, x: Tensor, z: Tensor, t: Tensor) -> Float[Tensor, "B"]:
        c, e = self.huber_c or HUBER_PER_ELEMENT * v[0].numel(), squared_error(v, x, z)
        return e / ((e + c**2).sqrt() + c) / v[0].numel()  # the same without the difference of near numbers


class LPIPSHuber(nn.Module):
    """(1 - t) Huber + w(t) distance(x_hat, x): configurations E (`time_weight="none"`) and F (`"1/t"`).

    Args:
        feature_distance: `distance(x_hat, x)`, a number a sample: a `FeatureDistance`, a `PyramidHuber`, or an object of `lpips` or `piq`
            (with `reduction="none"`; it is given images in [0, 1]); frozen and in eval mode.
        huber_c: as in `PseudoHuber`.
        time_weight: "none" or "1/t".
    """

    def __init__(self, feature_distance: nn.Module, huber_c: float | None = None, time_weight: str = "none") -> None:
        super().__init__()
        check_choice(("none", "1/t"), time_weight=time_weight)
        check_frozen(feature_distance)
        self.huber, self.distance, self.time_weight = PseudoHuber(huber_c), feature_distance, time_weight
        self.from_zero = type(feature_distance).__module__.partition(".")[0] == "piq"

    @property
    def name(self) -> str:
        """With the features that it looks at: figures of different ones do not compare."""
        features = getattr(self.distance, "name", type(self.distance).__name__)
        return f"LPIPS-Huber{'-1/t' if self.time_weight == '1/t' else ''} over {features}"

    def train(self, mode: bool = True) -> Self:
        """The features stay in eval mode."""
        super().train(mode)
        self.distance.eval()
        return self

    def forward(self, v: Tensor, x: Tensor, z: Tensor, t: Tensor) -> Float[Tensor, "B"]:
        column = spread(t, x)
        x_hat = (1 - column) * x + column * z - column * v
        distance = self.distance(*((each + 1) / 2 if self.from_zero else each for each in (x_hat, x)))
        if distance.numel() != len(x):
            raise ValueError(f'the distance is {tuple(distance.shape)}; expected ({len(x)},), a number a sample: reduction="none"')
        distance = distance.reshape(len(x))
        weighted = distance if self.time_weight == "none" else distance / t.to(distance)
        return (1 - t.to(weighted)) * self.huber(v, x, z, t) + weighted


def check_frozen(backbone: nn.Module) -> None:
    """ValueError where a part trains: it would drift while it judges."""
    if any(part.training for part in backbone.modules()):
        raise ValueError(f"the backbone {type(backbone).__name__} is in train mode; expected eval mode: pass backbone.eval()")
    if any(weight.requires_grad for weight in backbone.parameters()):
        raise ValueError(
            f"the backbone {type(backbone).__name__} has trainable parameters; expected a frozen one: pass backbone.requires_grad_(False)"
        )


class FeatureDistance(nn.Module):
    """LPIPS' form with any network: squared differences of features of unit length over the channels, mean over space, sum over layers.

    Args:
        backbone: takes images [B, C, H, W]; frozen and in eval mode. Gradients reach the images alone.
        layers: names of its parts (`named_modules`) whose outputs are compared; of a tuple the first tensor.
        weights: one non-negative tensor [channels] a layer; by default all are 1, LPIPS' "baseline".
        resize: the side that both images are brought to first, bilinearly.
        name: what reports call the backbone.

    Raises:
        ValueError: a backbone that trains, a layer that it lacks, or weights that do not fit (their channels: at the first call).

    Examples:
        >>> same = FeatureDistance(nn.Sequential(nn.Identity()).eval(), ["0"])
        >>> a, b = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
        >>> same(a, b).tolist()
        [2.0]
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[str],
        weights: Sequence[Tensor] | None = None,
        resize: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        check_frozen(backbone)
        known = dict(backbone.named_modules())
        missing = [layer for layer in layers if layer not in known]
        if missing or not layers:
            raise ValueError(f"layers are {list(layers)}; expected parts of the backbone: {', '.join(filter(None, known))}")
        if weights is not None and (len(weights) != len(layers) or any(not bool((each >= 0).all()) for each in weights)):
            raise ValueError(f"{len(weights)} weights for {len(layers)} layers; expected one a layer, without negative numbers")
        check_whole(optional=("resize",), resize=resize)
        self.backbone, self.layers, self.resize = backbone, tuple(layers), resize
        self.weights = nn.ParameterList(nn.Parameter(each.flatten(), requires_grad=False) for each in weights or ())
        self.name = name or type(backbone).__name__
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
        check_images(a=a, b=b)
        total = torch.zeros(len(a), device=a.device, dtype=at_least_single(a.dtype))
        with torch.no_grad():
            wanted = self.features(b)
        for place, (mine, theirs) in enumerate(zip(self.features(a), wanted, strict=True)):
            difference = (unit(mine) - unit(theirs)).square().flatten(2).mean(2)
            if len(self.weights) and len(self.weights[place]) != difference.shape[1]:
                layer, given = self.layers[place], len(self.weights[place])
                raise ValueError(f"layer {layer} has {difference.shape[1]} channels and {given} weights; expected one a channel")
            total = total + (difference * self.weights[place] if len(self.weights) else difference).sum(1)
        return total

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What the layers see, in the type of the backbone's weights."""
        x = x.to(next((weight.dtype for weight in self.backbone.parameters()), at_least_single(x.dtype)))
        if self.resize is not None:
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", align_corners=False)
        seen: dict[str, Any] = {}
        parts = dict(self.backbone.named_modules())
        # hooks for one call, so that the module can be copied and saved
        hooks = [parts[layer].register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out})) for layer in self.layers]
        try:
            self.backbone(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[layer] if isinstance(seen[layer], Tensor) else seen[layer][0] for layer in self.layers]


def unit(features: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
    """Of length 1 over the channels; float32 at least, as 1e-10 is 0 in half precision."""
    features = features.to(at_least_single(features.dtype))
    return features / (features.square().sum(1, keepdim=True) + UNIT_EPS).sqrt()


class PyramidHuber(nn.Module):
    """A distance without a network: the root of the mean square of each band of a Laplacian pyramid, pseudo-Huber, summed over the bands.

    Args:
        levels: bands; the image is halved between them while it can be.
        c: where the square becomes a line.
    """

    name = "a Laplacian pyramid"

    def __init__(self, levels: int = 3, c: float = 0.03) -> None:
        super().__init__()
        check_whole(levels=levels)
        check_positive(c=c)
        self.levels, self.c = levels, c
        self.eval()

    def forward(self, a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
        check_images(a=a, b=b)
        if a.ndim != 4:
            raise ValueError(f"a is {tuple(a.shape)}; expected images [B, C, H, W]: take PseudoHuber() for other data")
        rest = (a - b).to(at_least_single(a.dtype))
        total = torch.zeros_like(rest[:, 0, 0, 0])
        for level in range(self.levels):
            last = level == self.levels - 1 or min(rest.shape[-2:]) < 2
            smaller = rest if last else F.avg_pool2d(rest, 2, ceil_mode=True)
            band = rest if last else rest - F.interpolate(smaller, rest.shape[-2:], mode="bilinear", align_corners=False)
            square = band.flatten(1).square().mean(1)
            total = total + square / ((square + self.c**2).sqrt() + self.c)
            if last:
                break
            rest = smaller
        return total


class TeacherFeatures(nn.Module):
    """The teacher's own view of clean images at a low noise level: a backbone that needs no labels.

    Its layers are those of the velocity, such as "velocity.eps_model.down_blocks.0".

    Args:
        velocity: `VelocityFromEDM`, `VelocityFromVP` or a flow; frozen and in eval mode.
        sigma: the level, 0.1 to 0.3.
        label: that all images are seen under, where the teacher takes one.
    """

    def __init__(self, velocity: nn.Module, sigma: float = 0.2, label: int | None = None) -> None:
        super().__init__()
        check_positive(sigma=sigma)
        self.velocity, self.t, self.label = velocity, sigma / (1 + sigma), label
        self.training = velocity.training

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        condition = () if self.label is None else (torch.full((len(x),), self.label, device=x.device),)
        return self.velocity((1 - self.t) * x, torch.tensor(self.t, dtype=torch.float64), *condition)


def classifier_distance(
    images: Float[Tensor, "N C H W"], labels: Int[Tensor, "N"], *, steps: int = 500, batch_size: int = 128, seed: int = 0
) -> FeatureDistance:
    """Features of a small classifier trained on the spot: its three 3x3 convolutions of 8, 16 and 16 channels, the second halving the image.

    Args:
        images: in [-1, 1], with their labels from 0.
    """
    check_images(images=images)
    check_whole(steps=steps, batch_size=batch_size)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected whole numbers from 0, one an image ({len(images)})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = digit_classifier(images.shape[1:], int(labels.max()) + 1)
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randint(len(images), (batch_size,), generator=draw) for _ in range(steps))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    fit_steps(optimizer, lambda row: F.cross_entropy(net(images[row]), labels[row].long()), rows, steps)
    return of_classifier(net)


def digit_classifier(shape: Sequence[int], classes: int) -> nn.Sequential:
    channels, height, width = shape
    return conv_net((channels, height, width), classes, (8, 16, 16), strides=(1, 2, 1))


def of_classifier(net: nn.Sequential) -> FeatureDistance:
    """The distance over the outputs of a classifier's convolutions, before their ReLU: what that cuts off, so few channels do not see."""
    layers = [str(place) for place, part in enumerate(net) if isinstance(part, nn.Conv2d)]
    return FeatureDistance(net.eval().requires_grad_(False), layers, name="a small classifier's three stages")


def lpips_distance(vgg16: str | Path, heads: str | Path | None = None) -> FeatureDistance:
    """LPIPS itself from local weights, average pooling in place of maximum pooling, images brought to 224 x 224 and from [-1, 1] to [0, 1].

    Args:
        vgg16: a safetensors file with torchvision's names, "features.0.weight" and so on.
        heads: a safetensors file with the linear heads under LPIPS' names, "lin0.model.1.weight" and so on; without it all weights are 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, or other weights.
    """
    if not Path(vgg16).is_file():
        raise FileNotFoundError(
            f"{vgg16} is no file; expected VGG16's weights as safetensors, which are not downloaded: pass their file, an object of lpips or "
            "piq to LPIPSHuber, or another distance: classifier_distance(images, labels), PyramidHuber()"
        )
    channels, parts = 3, []
    for out in VGG16:
        parts += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()] if out else [nn.AvgPool2d(2)]
        channels = out or channels
    net = nn.Sequential(*parts)
    read = {name.removeprefix("features."): value for name, value in read_weights(vgg16).items() if not name.startswith("classifier")}
    try:
        net.load_state_dict(read)
        weights = heads and [value.flatten() for _, value in sorted(read_weights(heads).items())]
    except RuntimeError as error:
        raise ValueError(f"{vgg16} holds other weights than VGG16's ({' '.join(str(error).split())[:200]}); pass torchvision's") from error
    mean, deviation = torch.tensor(IMAGENET)
    with torch.no_grad():  # pixels of [-1, 1] become ImageNet's normalised ones: (x + 1) / 2, minus the mean, over the deviation
        scaling = nn.Conv2d(3, 3, 1, groups=3)
        scaling.weight.copy_((0.5 / deviation).reshape(3, 1, 1, 1))
        scaling.bias = nn.Parameter((0.5 - mean) / deviation)
    whole = nn.Sequential(scaling, *net).eval().requires_grad_(False)
    return FeatureDistance(whole, [str(int(layer) + 1) for layer in VGG16_LAYERS], weights or None, VGG16_SIDE, name="VGG16 (LPIPS)")
