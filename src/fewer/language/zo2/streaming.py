"""ZO2: MeZO whose blocks live elsewhere; each is fetched once a step, both passes run on it while it is there, and it goes back.

Source: ZO2, arXiv 2503.12668, Algorithms 2 and 3 (dual forward, deferred update), with the reference's bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewer.devices import choose_device
from fewer.files import check_new, made_whole, read_weights, whole_file
from fewer.fitting import evaluating
from fewer.language.zo2.blocks import Trace, check_order, enter, in_place, leave, mean_loss, micro_batches, split, trace
from fewer.language.zo2.checkpoints import STATE, Digest, Weights, move, put, read_index, skeleton, write_journal, write_shards
from fewer.language.zo2.mezo import DRAWS, WALK, StepResult, Trained, Update, ZO2Config, checked_loss, over_workers, projected_gradient
from fewer.language.zo2.stores import DiskStore, HostStore, Short, Store, check_space


class ZO2:
    """Fine-tune a model by forward passes alone, its blocks streamed through a device that holds three of them.

    Args:
        model: a causal language model of transformers, or any module whose forward walks a ModuleList in order, each block taking the hidden
            state (first, or as `hidden_states`) and returning the next. Only parameters that require a gradient are trained.
        config: see `ZO2Config`.
        blocks: the dotted path of the ModuleList; found for Llama, Mistral, Qwen2 and 3, Gemma, OPT and GPT-2.
        resume: go on from the state in `config.store_dir`, whatever the model's own weights are.
        group: a torch.distributed group of workers with the same weights and other data; they exchange one number a step.

    Attributes:
        lr: the learning rate of the next step; a schedule may change it.
        steps: how many were taken.
        pending: the last step's update, which the next step or `flush` applies.
        journal: all updates so far.
        base: a digest of the weights that the journal begins with.
        store: counts `bytes_read`, `bytes_written`, `most_attached`.

    Raises:
        ValueError: no blocks (the candidates are listed), parameters shared between blocks or out of order, nothing to train, too little
            space, a store of another model.
        FileExistsError: something stands in `config.store_dir` and `resume` is not asked for.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> ids = torch.arange(64).reshape(2, 32)
        >>> zo2 = ZO2(micro_lm(), ZO2Config(lr=1e-4, store="cpu", working_device="cpu"))
        >>> before = zo2.step(ids).loss
        >>> zo2.evaluate(ids) != before, zo2.store.most_attached <= 3
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZO2Config | None = None,
        blocks: str | None = None,
        *,
        resume: bool = False,
        group: Any = None,
        value_of: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.model, self.config, self.group = model, config or ZO2Config(), group
        self.lr, self.steps, self.journal = self.config.lr, 0, list[Update]()
        self.pending: Update | None = None
        self._broken = False
        self._kept: set[str] | None = None  # resident parameters that are perturbed before the blocks and used behind them
        parts = split(model, blocks, self.config.rng)
        self.path, self._names = parts.path, [list(block) for block in parts.blocks]
        self._early, self._late = list(parts.early), list(parts.late)
        self.device = torch.device(choose_device(self.config.working_device))
        self.store = self._new_store(parts.blocks)
        if resume:
            self._read_state()
            return
        digest = Digest()
        values = digest.watched(value_of or (lambda name: model.get_parameter(name)))
        for name in self._early + self._late if value_of is None else ():
            values(name)
        if value_of is not None:
            self._put_resident(values)
        move(self.model, self._early + self._late, self.device)
        self._fill(values, digest)

    # Making and remaking

    @classmethod
    def from_pretrained(
        cls, model_dir: str | Path, config: ZO2Config | None = None, *, blocks: str | None = None, resume: bool = False, group: Any = None
    ) -> ZO2:
        """A model directory of transformers, read block by block and never held (unless `store` is "none").

        Raises:
            ValueError: it is no such directory; the message names the file and the reason.
        """
        weights = Weights(Path(model_dir))
        return cls(skeleton(Path(model_dir), weights.dtype), config, blocks, resume=resume, group=group, value_of=weights)

    @classmethod
    def resume(cls, store_dir: str | Path) -> ZO2:
        """Go on from the last whole step of a run with `store="disk"` on a model of transformers, however it ended."""
        state = read_index(Path(store_dir))
        config = dataclasses.replace(ZO2Config.from_dict(state["config"]), store_dir=str(store_dir))
        if not (Path(store_dir) / "config.json").is_file():
            raise ValueError(f"{store_dir} is of a model that is none of transformers'; expected ZO2(model, config, resume=True)")
        return cls(skeleton(Path(store_dir), getattr(torch, state["dtype"])), config, state["blocks"], resume=True)

    def _new_store(self, blocks: list[dict[str, nn.Parameter]]) -> Store:
        words = self.config
        if words.store == "none":
            return Store(self.model, blocks, self.device)
        short = Short(getattr(torch, words.store_dtype), words.store_rounding) if words.store_dtype else None
        given = (self.model, blocks, self.device, short, words.overlap, words.seed)
        return DiskStore(*given, folder=Path(str(words.store_dir))) if words.store == "disk" else HostStore(*given)

    def _fill(self, values: Callable[[str], Tensor], digest: Digest) -> None:
        """The first state of the store."""
        store = self.store
        if not isinstance(store, HostStore):
            for name in itertools.chain(*self._names):
                value = values(name)
                if self.model.get_parameter(name).is_meta:
                    put(self.model, name, value)
            self.model.to(self.device)
        elif not isinstance(store, DiskStore):
            self._fill_blocks(values)
        else:
            final = check_new(store.folder, option="store_dir")
            check_space(final, store.block_bytes + sum(self.model.get_parameter(name).nbytes for name in self._early + self._late))
            with made_whole(final, option="store_dir") as part:
                store.folder = part
                try:
                    self._fill_blocks(values)
                    if hasattr(self.model, "config"):
                        cast(Any, self.model).config.save_pretrained(part)
                    self.base = str(digest)
                    self._commit()
                finally:
                    store.folder = final
        self.base = str(digest)

    def _fill_blocks(self, values: Callable[[str], Tensor]) -> None:
        store = cast(HostStore, self.store)
        for number in range(len(self._names)):
            store.fill(number, values)
        store.end_walk()

    def _put_resident(self, values: Callable[[str], Tensor]) -> None:
        for name in self._early + self._late:
            put(self.model, name, values(name))

    # A step

    @torch.no_grad()
    def step(self, batch: Any, seed: int | None = None) -> StepResult:
        """Two forward passes and the update of the step before; this step's own update waits until the next one or `flush`.

        Args:
            batch: token ids, int64 [B, T]; the words of the model's forward with `labels`; or a callable that takes the model and returns
                the loss. A list of such, or `config.micro_batches` parts of one, are averaged.
            seed: of z; by default that of `config.seed` and the step's number.

        Raises:
            ValueError: the loss is no finite scalar: nothing is updated.
        """
        seed = self.config.step_seed(self.steps) if seed is None else seed
        batches = micro_batches(batch, self.config.micro_batches, self.device)
        with evaluating(self.model):
            traces = self._traces(batches)  # what is wrong with a batch shows here, before anything is changed
            with self._whole():
                losses = self._pass(seed, batches, traces)
                self._walked()
                one, two = (checked_loss(loss, self.steps, seed) for loss in losses)
                self._take(Update(seed, projected_gradient(over_workers(one - two, self.group), self.config.eps), self.lr))
        return StepResult(one.item(), self.journal[-1].g, seed)

    @property
    def lost_updates(self) -> float | None:
        """The share of the blocks' trained numbers that the last walk left as they were, though an update went by: what a short store loses."""
        same, count = self.store.lost
        return same / count if count and len(self.journal) > 1 else None

    def redo(self, update: Update) -> None:
        """Take a step whose projected gradient is known, without a forward pass: its perturbations and its update, to the bit."""
        with self._whole(), torch.no_grad():
            self._pass(update.seed, None, [])
            self._walked()
            self._take(update)

    def _walked(self) -> None:
        """The walk has ended: what is in memory is whole again, the update that waited is in it. A directory counts when it is committed."""
        if not isinstance(self.store, DiskStore):
            self.pending, self._broken = None, False

    def _take(self, update: Update) -> None:
        self.pending, self.steps = update, self.steps + 1
        self.journal.append(update)
        self.store.end_walk()
        self._commit()
        self._broken = False

    def _pass(self, seed: int, batches: list[Any] | None, traces: list[Trace]) -> list[Tensor]:
        """The walk: every part of the model is updated, moved by + eps z, run, moved by - 2 eps z, run, and moved back."""
        replayed, draws = self._replayed(), DRAWS[self.config.rng](seed, self.device)
        hidden: list[list[Tensor]] = [[], []]
        kept: list[dict[str, Tensor]] = [{}, {}]
        losses: list[Tensor] = []

        def turn(names: list[str], run: Callable[[int], None]) -> None:
            trained = self._trained(names)
            if replayed is not None and self.pending is not None:
                trained.update_(replayed, self.pending)
            perturb = trained.perturbations(draws)
            for number, scaling in enumerate(WALK):
                perturb(scaling)
                if number < 2 and batches is not None:
                    run(number)

        def run_early(number: int) -> None:
            hidden[number] = [enter(self.model, self.path, batch) for batch in batches or ()]
            kept[number] = {name: self.model.get_parameter(name).data.clone() for name in self._kept or ()}

        def run_late(number: int) -> None:
            with in_place(self.model, kept[number]):
                left = [
                    leave(self.model, self.path, len(traces[0].calls), *each) for each in zip(batches or (), hidden[number], strict=True)
                ]
            losses.append(mean_loss(left))
            kept[number].clear()

        turn(self._early, run_early)
        with contextlib.closing(self.store.walk()) as walk:
            for number in walk:
                block = self._block(number)

                def run(which: int, number: int = number, block: nn.Module = block) -> None:
                    hidden[which] = [each.calls[number](block, h) for each, h in zip(traces, hidden[which], strict=True)]

                turn(self._names[number], run)
        turn(self._late, run_late)
        return losses

    def _block(self, number: int) -> nn.Module:
        return cast(nn.ModuleList, self.model.get_submodule(self.path))[number]

    def _replayed(self) -> Any:
        """The second generator, which draws the z of the step before again."""
        return DRAWS[self.config.rng](self.pending.seed, self.device) if self.pending else None

    def _traces(self, batches: list[Any]) -> list[Trace]:
        """What the blocks are called with (masks, rotary tables), made once for both passes; which parameters are used where, once."""
        if batches and self._kept is None:
            seen = trace(self.model, self.path, len(self._names), batches[0], whole=True)
            parameters = {name: self.model.get_parameter(name) for name in self._early + self._late}
            if self.config.rng == "torch":
                check_order({name: parameters[name] for name in self._late}, seen.before)
            if self.config.rng == "counter":  # each z is its own: what runs first is perturbed first
                self._early = [name for name, each in parameters.items() if id(each) in seen.before or name in self._early]
                self._late = [name for name in parameters if name not in self._early]
            self._kept = {name for name in self._early if id(parameters[name]) in seen.after and parameters[name].requires_grad}
        return [trace(self.model, self.path, len(self._names), batch, whole=False) for batch in batches]

    def _trained(self, names: list[str]) -> Trained:
        """The parameters among these that are trained, as they are attached now."""
        found = ((name, self.model.get_parameter(name)) for name in names)
        return Trained(((name, each) for name, each in found if each.requires_grad), self.config)

    # The state

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the update that waits; without one nothing changes."""
        if self.pending is None:
            return
        with self._whole():
            replayed, pending = self._replayed(), self.pending
            self._trained(self._early).update_(replayed, pending)
            with contextlib.closing(self.store.walk()) as walk:
                for number in walk:
                    self._trained(self._names[number]).update_(replayed, pending)
            self._trained(self._late).update_(replayed, pending)
            self.pending = None
            self.store.end_walk()
            self._commit()
            self._broken = False

    @torch.no_grad()
    def evaluate(self, batch: Any) -> float:
        """The loss on a batch (as `step` takes it), every update applied."""
        self.flush()
        batches = micro_batches(batch, self.config.micro_batches, self.device)
        with evaluating(self.model):
            traces = [trace(self.model, self.path, len(self._names), each, whole=False) for each in batches]
            hidden = [each.hidden for each in traces]
            with contextlib.closing(self.store.walk(write=False)) as walk:
                for number in walk:
                    block = self._block(number)
                    hidden = [each.calls[number](block, h) for each, h in zip(traces, hidden, strict=True)]
            left = [leave(self.model, self.path, len(self._names), *each) for each in zip(batches, hidden, strict=True)]
        return mean_loss(left).item()

    def named_values(self) -> Iterator[dict[str, Tensor]]:
        """All parameters by full name, a block at a time and then what stays on the device; every update applied."""
        self.flush()
        with contextlib.closing(self.store.walk(write=False)) as walk:
            for number in walk:
                yield {name: self.model.get_parameter(name).detach() for name in self._names[number]}
        yield {name: self.model.get_parameter(name).detach() for name in self._early + self._late}

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, every update applied; this holds the whole model (`save_pretrained` does not)."""
        model = {name: value.cpu().clone() for part in self.named_values() for name, value in part.items()}
        return {"model": model, "steps": self.steps, "lr": self.lr, "base": self.base, "journal": [list(each) for each in self.journal]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state_dict` gave; ValueError where it is one of another model."""
        model = state["model"]
        names = [*itertools.chain(*self._names), *self._early, *self._late]
        odd = [name for name in names if name not in model or model[name].shape != self.model.get_parameter(name).shape]
        if odd:
            raise ValueError(
                f"the state lacks {odd[0]} in this model's shape; expected a state of this very model: build the model it is of"
            )
        for name in names if not self.store.streams else self._early + self._late:
            self.model.get_parameter(name).data.copy_(model[name])
        if self.store.streams:
            self._fill_blocks(lambda name: model[name])
        self.steps, self.lr, self.base = state["steps"], state["lr"], state["base"]
        self.journal, self.pending, self._broken = [Update(*each) for each in state["journal"]], None, False
        self._commit()

    def save_pretrained(self, out_dir: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> Path:
        """Write a directory that transformers loads, a block at a time, every update applied; with it `journal.json`, whole or not at all."""
        if not hasattr(self.model, "config"):
            raise ValueError(f"{type(self.model).__name__} is no model of transformers; expected one: use state_dict")
        inputs = [self.config.store_dir] if self.config.store_dir else []
        with made_whole(out_dir, overwrite, inputs=inputs, option="out_dir") as part:
            buffers = {name for name, _ in self.model.named_buffers()} & set(self.model.state_dict())
            extra = {name: self.model.get_buffer(name) for name in buffers}
            write_shards(self.model, part, itertools.chain(self.named_values(), [extra] if extra else []))
            write_journal(part / "journal.json", self.base, self.config, self.journal)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        return Path(out_dir)

    def _commit(self) -> None:
        """Make the generation that was written last the one that counts: what stays resident first, the index that names both last."""
        store = self.store
        if not isinstance(store, DiskStore):
            return
        from safetensors.torch import save_file

        resident = {name: self.model.get_parameter(name).detach().cpu().contiguous() for name in self._early + self._late}
        with whole_file(store.folder / f"resident.{store.generation}.safetensors", overwrite=True) as part:
            save_file(resident, part)
        dtype = str(self.model.get_parameter((self._early + self._late or self._names[0])[0]).dtype).removeprefix("torch.")
        state = {
            "steps": self.steps, "generation": store.generation, "walks": store.walks, "pending": self.pending, "lr": self.lr, "dtype": dtype,
            "base": self.base, "blocks": self.path, "layout": self._layout(), "config": self.config.to_dict(), "journal": self.journal,
        }  # fmt: skip
        with whole_file(store.folder / STATE, overwrite=True) as part:
            part.write_text(json.dumps(state), encoding="utf8")

    def _layout(self) -> list[Any]:
        return [layout.describe() for layout in self.store.layouts]

    def _read_state(self) -> None:
        """Take over the last whole step that the directory names."""
        store = self.store
        if not isinstance(store, DiskStore):
            raise ValueError(f"store is {self.config.store!r}; expected 'disk', which alone can be resumed: use load_state_dict")
        state = read_index(store.folder)
        for part in store.folder.glob(".fewer-*"):  # what a step that was killed had not finished
            part.unlink() if part.is_file() else part.rmdir()
        if state["layout"] != self._layout() or state["config"].get("store_dtype") != self.config.store_dtype:
            raise ValueError(f"{store.folder} holds blocks of another model or type; expected those of this one: name its own store_dir")
        store.generation, store.walks = state["generation"], state["walks"]
        resident = read_weights(store.folder / f"resident.{store.generation}.safetensors")
        self._put_resident(lambda name: resident[name])
        move(self.model, self._early + self._late, self.device)
        for number in range(len(self._names)):
            store._detach(number)
        self.pending = Update(*state["pending"]) if state["pending"] else None
        self.steps, self.base, self.lr = state["steps"], state["base"], state["lr"]
        self.journal = [Update(*each) for each in state["journal"]]

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """What is broken off in here leaves the last whole step where the store has one, and is not gone on with where it has none."""
        if self._broken:
            raise RuntimeError("a step was broken off in the middle, and its weights are in no whole state; expected load_state_dict first")
        self._broken = True
        try:
            yield
        finally:
            if self._broken and isinstance(self.store, DiskStore):
                self._read_state()
                self._broken = False
