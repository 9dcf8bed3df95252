"""A language model of which some heads and channels are trained in place, wrapped as peft wraps one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewer.language._shared.structure import KINDS, Side, Structure, check_trainable, shapes_of, structure_of
from fewer.language.s2ft.adapters.adapter import Adapter, Fusion, Slice, base_hash, check_base, check_fits, fuse, names_of
from fewer.language.s2ft.adapters.serving import BASE, adapters_by_row
from fewer.language.s2ft.config import S2FTConfig
from fewer.language.s2ft.permutation import Permutation, permute_
from fewer.language.s2ft.selection import Calibration, Selection, select_units
from fewer.language.s2ft.slice_linear import Form, S2Linear, neighbours


def get_s2ft_model(
    model: nn.Module, config: S2FTConfig | None = None, calibration: Calibration | None = None, adapter_name: str = "default"
) -> S2FTModel:
    """Freeze a model but for a selection of its heads and channels, which are trained in place.

    Args:
        model: a causal language model of transformers (Llama, Mistral, Qwen2, Gemma, OPT, GPT-2); it is changed in place.
        config: what to train; by default 3 % of the channels of down_proj.
        calibration: batches of token ids for the selections that need them.
        adapter_name: what the trained part is called.

    Raises:
        ValueError: a model of no known family, or missing calibration.
        TypeError: quantised weights that are to be trained in place.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model = get_s2ft_model(micro_lm(), S2FTConfig(d_ratio=0.05))
        >>> model.print_trainable_parameters()
        trainable params: 1,600 || all params: 279,104 || trainable%: 0.5733
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        >>> ids = torch.arange(10)[None]
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
        >>> type(model.merge_and_unload()).__name__
        'LlamaForCausalLM'
    """
    config = config or S2FTConfig()
    structure = structure_of(model, config.target_families)
    check_trainable(model, structure, in_place=config.in_place)
    selection = select_units(model, config, calibration)
    return S2FTModel(model, config, selection, adapter_name=adapter_name)


class S2FTModel(nn.Module):
    """A model with one or more S2FT adapters, one of them in effect. Made by `get_s2ft_model` or `S2FTModel.from_pretrained`.

    Attributes:
        base_model: the wrapped model; what this class lacks (`config`, `generate`, ...) is asked of it.
        adapters: name -> what it changes; the active one's entry is as it was when it was made or switched to.
        active_adapter: the name of the one that is in effect and trained.
        permutation: how channels are ordered now; saved adapters are in the model's own order.
    """

    def __init__(self, model: nn.Module, config: S2FTConfig, selection: Selection, *, adapter_name: str = "default") -> None:
        super().__init__()
        self.s2ft_config, self.active_adapter, self.merged = config, adapter_name, True
        self.structure = structure_of(model, config.target_families)
        self.base_hash = base_hash(model)
        self._wanted_gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        channels = selection.only("u", "d") if config.in_place and config.layout == "permuted" else Selection({})
        self.permutation: Permutation = permute_(model, channels)
        self.base_model = model.requires_grad_(False)
        self.adapters: dict[str, Adapter] = {}
        self._unloaded = False
        for kind, layers in selection.units.items():
            for layer, units in layers.items():
                target = self.structure.target(kind, layer)
                index = self.structure.positions(kind, layer, units)
                self._train(target.path, target.side, index)
        self.adapters[adapter_name] = self._trained()

    # Where the parts are

    @property
    def layers(self) -> dict[str, S2Linear]:
        """The linear maps that are trained now, by path in the base model."""
        return {name: module for name, module in self.base_model.named_modules() if isinstance(module, S2Linear)}

    def _orders(self) -> dict[str, Tensor]:
        """path -> `order[now] = the model's own`, for the maps whose trained side has been permuted."""
        targets = (
            (self.structure.target(kind, layer).path, order) for layer, order in self.permutation.channels.items() for kind in ("u", "d")
        )
        return dict(targets)

    def _train(self, path: str, side: Side, own: Tensor, delta: Tensor | None = None) -> None:
        """Train rows or columns (numbered in the model's own order) of a linear map from now on, `delta` away from the base."""
        place = self._orders().get(path)
        where = own if place is None else place.argsort()[own]
        order = where.argsort()
        index, form = where[order], self._form(path, where[order])
        delta = None if delta is None else delta.index_select(0 if side == "rows" else 1, order)
        linear = self.base_model.get_submodule(path)
        if isinstance(linear, S2Linear):
            linear.target(index, form, delta)
        else:
            self.base_model.set_submodule(path, S2Linear(linear, index, side, form, delta))

    def _form(self, path: str, index: Tensor) -> Form:
        if not self.s2ft_config.in_place:
            return "delta"
        return "view" if path in self._orders() and neighbours(index) is not None else "gather"

    def _trained(self) -> Adapter:
        """The active adapter as it is now, in the model's own order."""
        orders, shapes, slices = self._orders(), shapes_of(self.base_model), {}
        for path, layer in self.layers.items():
            index = layer.index.cpu()
            own = orders[path][index] if path in orders else index
            slices[path] = Slice(layer.side, own, layer.delta().cpu(), shapes[path][0 if layer.side == "rows" else 1]).sorted()
        return Adapter(self.s2ft_config, self.base_hash, slices)

    # A model like any other

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **words: Any,
    ) -> Any:
        """The base model's forward with the active adapter, or with `adapter_names`, one for each row ("__base__" for none)."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        words |= {name: value for name, value in named.items() if value is not None}
        with self._by_row(adapter_names):
            return self.base_model(**words)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **words: Any) -> Any:
        """The base model's `generate`, with the active adapter or with one for each row."""
        with self._by_row(adapter_names):
            return cast(Any, self.base_model).generate(*args, **words)

    @contextlib.contextmanager
    def _by_row(self, names: Sequence[str] | None) -> Iterator[None]:
        if names is None:
            yield
            return
        chosen = {name: self.adapter(name) for name in dict.fromkeys(names) if name != BASE}
        orders = self._orders()
        with self.disable_adapter(), adapters_by_row(self.base_model, chosen, names, orders):
            yield

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # while a copy is being made
                raise
            return getattr(self.base_model, name)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """What training changes: S, S0 and the index of each map. The frozen base is left out, as it is of an adapter."""
        destination = args[0] if args else {} if destination is None else destination
        for path, layer in self.layers.items():
            own = {"s": layer.s if keep_vars else layer.trained().contiguous(), "s0": layer.s0, "index": layer.index}
            destination.update({f"{prefix}{path}.{name}": value for name, value in own.items()})
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Take S, S0 and the index of each map from a state that this model, or one with the same selection, gave.

        Raises:
            ValueError: the state is of another selection, or (strict) lacks a map.
        """
        layers = self.layers
        missing = [path for path in layers if f"{path}.s" not in state_dict]
        extra = [name for name in state_dict if name.rpartition(".")[0] not in layers]
        if missing or (strict and extra):
            raise ValueError(f"the state lacks {names_of(missing)} and has {names_of(extra)} too many; expected one of the same selection")
        for path, layer in layers.items():
            if not torch.equal(state_dict[f"{path}.index"].to(layer.index.device), layer.index):
                raise ValueError(
                    f"{path}: the state trains other rows or columns; expected the same selection: use the same config and seed"
                )
        for path, layer in layers.items():
            layer.s0.copy_(state_dict[f"{path}.s0"])
            layer.write(state_dict[f"{path}.s"].to(layer.s0))
        return nn.modules.module._IncompatibleKeys([], extra)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) parameters; S is a part of the weights and not counted twice."""
        own = {id(layer.s) for layer in self.layers.values()}
        return (
            sum(p.numel() for p in self.parameters() if p.requires_grad),
            sum(p.numel() for p in self.parameters() if id(p) not in own),
        )

    def print_trainable_parameters(self) -> None:
        """Say how many parameters are trained, in peft's words."""
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    # Adapters

    def adapter(self, name: str | None = None) -> Adapter:
        """An adapter by name, the active one as it is now; ValueError where there is none of that name."""
        name = self.active_adapter if name is None else name
        if name not in self.adapters:
            raise ValueError(f"there is no adapter {name!r}; expected one of {names_of(self.adapters)}")
        return self._trained() if name == self.active_adapter and not self._unloaded else self.adapters[name]

    def save_pretrained(self, save_directory: Path | str, **_: Any) -> None:
        """Write the active adapter: `adapter_config.json` and `adapter_model.safetensors`, in the model's own order of channels."""
        double = next(self.base_model.parameters()).dtype == torch.float64
        self.adapter().save(save_directory, torch.float64 if double else torch.float32)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, directory: Path | str, adapter_name: str = "default", *, other_base: bool = False
    ) -> S2FTModel:
        """A base model with a saved adapter, which can be trained on.

        Args:
            other_base: take it although it was trained on other weights: its base in other precision, or quantised.

        Raises:
            ValueError: the directory holds no adapter, or one for another architecture, other shapes (the layer is named) or other weights.
        """
        adapter = Adapter.load(directory)
        structure = structure_of(model, adapter.config.target_families)
        check_trainable(model, structure, in_place=adapter.config.in_place)
        check_fits(adapter, shapes_of(model))
        if not other_base:
            check_base(adapter, base_hash(model))
        wrapped = cls(model, adapter.config, _selection_of(adapter, structure), adapter_name=adapter_name)
        wrapped._put(adapter)
        wrapped.adapters[adapter_name] = adapter
        return wrapped

    def load_adapter(self, directory: Path | str, adapter_name: str, *, other_base: bool = False) -> None:
        """Read a saved adapter beside the others; `set_adapter` puts it into effect.

        Raises:
            ValueError: the name is taken, or as in `from_pretrained`.
        """
        self.add_adapter(adapter_name, Adapter.load(directory), other_base=other_base)

    def add_adapter(self, adapter_name: str, adapter: Adapter, *, other_base: bool = False) -> None:
        """Keep an adapter under a name; ValueError where the name is taken or the adapter does not fit, or is of other weights."""
        if adapter_name in self.adapters:
            raise ValueError(f"there is an adapter {adapter_name!r} already; expected a new name beside {names_of(self.adapters)}")
        check_fits(adapter, shapes_of(self.base_model))
        if not other_base:
            check_base(adapter, self.base_hash)
        self.adapters[adapter_name] = adapter

    def set_adapter(self, adapter_name: str) -> None:
        """Switch to another adapter: the base's bits are restored, and the other's slices written. Its S are new Parameters.

        Raises:
            ValueError: there is none of that name.
        """
        self._check_wrapped()
        adapter = self.adapter(adapter_name)
        self.adapters[self.active_adapter] = self._trained()
        self._put(adapter)
        self.active_adapter = adapter_name

    def _put(self, adapter: Adapter) -> None:
        """Restore the base and write an adapter's slices; the maps that it does not change are plain again."""
        for path, layer in self.layers.items():
            if layer.active:
                layer.switch_off()
            if path not in adapter.slices:
                self.base_model.set_submodule(path, layer.release())
        for path, part in adapter.slices.items():
            self._train(path, part.side, part.index, part.delta)
        self.merged = True

    def add_adapters(self, names: Sequence[str], adapter_name: str | None = None) -> Fusion:
        """Keep the sum of adapters under a new name (by default their names with a plus between).

        Returns:
            the sum, and where their selections overlap: elsewhere each keeps its own effect.

        Raises:
            ValueError: an unknown name, adapters of different bases, or a name that is taken.
        """
        fusion = fuse([self.adapter(name) for name in names])
        self.add_adapter(adapter_name or "+".join(names), fusion.adapter)
        return fusion

    # In and out of the weights

    def unmerge_adapter(self) -> None:
        """Put the base's own bits back; the active adapter is kept aside and has no effect. ValueError where that is so already."""
        self._check_wrapped()
        if not self.merged:
            raise ValueError("the adapter is not merged; expected one that is: call merge_adapter first")
        for layer in self.layers.values():
            layer.switch_off()
        self.merged = False

    def merge_adapter(self) -> None:
        """Put the active adapter into effect again. ValueError where it is, as it is from the start: training happens in the weights."""
        self._check_wrapped()
        if self.merged:
            raise ValueError("the adapter is merged already (training happens in the weights); expected one that is not: merge once")
        for layer in self.layers.values():
            layer.switch_on()
        self.merged = True

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, inside the block."""
        was_merged = self.merged
        if was_merged:
            self.unmerge_adapter()
        try:
            yield
        finally:
            if was_merged:
                self.merge_adapter()

    def merge_and_unload(self) -> Any:
        """The plain model with the active adapter in its weights, channels in its own order. This wrapper is empty afterwards."""
        return self._unload(keep=True)

    def unload(self) -> Any:
        """The plain model as it was, bit for bit."""
        return self._unload(keep=False)

    def _check_wrapped(self) -> None:
        if self._unloaded:
            raise ValueError("the model has been merged or unloaded already; expected to do that once: wrap it again with get_s2ft_model")

    @torch.no_grad()
    def _unload(self, keep: bool) -> Any:
        self._check_wrapped()
        self.adapters[self.active_adapter] = self._trained()  # what can still be saved
        for path, layer in self.layers.items():
            if not keep and layer.active:
                layer.switch_off()
            if keep and not layer.active:
                layer.switch_on()
            if keep and layer.form == "delta":
                layer.into_base(path)
            layer.sync()
            self.base_model.set_submodule(path, layer.release())
        self.permutation.inverse().apply_(self.base_model)
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(self._wanted_gradients.get(name, False))
        self._unloaded = True
        return self.base_model


def _selection_of(adapter: Adapter, structure: Structure) -> Selection:
    """The units whose slices an adapter has."""
    units: dict[Any, dict[int, tuple[int, ...]]] = {}
    for kind in KINDS:
        for layer in structure.layers:
            path, _, size, offset = structure.target(kind, layer)
            if path in adapter.slices:
                index = adapter.slices[path].index
                units.setdefault(kind, {})[layer] = tuple(dict.fromkeys(((index - offset) // size).tolist()))
    return Selection(units)
