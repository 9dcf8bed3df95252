"""Fine-tuning with LoRA, dense or sparse: a trained model moved to other text, and what a layer of SmolLM2's shapes costs.

LoRA runs with eager attention (what the paper compares with) and with fused attention (what everybody has today). The clock and the
memory of a layer are taken with the first seed alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import load_state_of_the_union
from fewer.devices import one_thread
from fewer.language._shared.model_directory import load_directory, load_tokenizer
from fewer.language._shared.trained import DATA_HELP, HELD_OUT_HELP, STEPS_HELP, corpus_of_pairs
from fewer.language.spt.attention import sparse_attention
from fewer.language.spt.model import SPTConfig, SPTModel, get_spt_model, with_lora
from fewer.language.spt.peers import chosen_by, newest_keys, true_keys
from fewer.language.spt.quantizer import ProductQuantizer, lookup
from fewer.language.spt.routed import RoutedGatedFFN
from fewer.meters import count_flops, median_seconds, saved_bytes
from fewer.study import Bars, Curve, Figure, Results, Scale, Study, Trial
from fewer.study.races import ratio_of_pairs
from fewer.tasks import fetch_small_lm, token_loss
from fewer.tasks.language_corpus import Corpus, text_corpus, token_stream
from fewer.tasks.lm_training import check_window, draw_windows

STEPS = {Scale.QUICK: 30, Scale.FULL: 5120}
BATCH = {Scale.QUICK: 2, Scale.FULL: 4}
LR = {Scale.QUICK: 1e-3, Scale.FULL: 1e-4}
WINDOW, RANK = 512, 16
HELD_OUT = 8_192
BOOK_STEPS = 200  # of the code books alone, before
ADDRESSES, UNSEEN = 12, 2
LENGTHS = (512, 1024, 2048, 4096)  # at which sparse attention runs against fused attention


class Shapes(NamedTuple):
    """SmolLM2-135M's, and how many tokens a layer is measured on."""

    hidden: int = 576
    channels: int = 1536
    heads: int = 9
    width: int = 64
    tokens: int = 1024


SHAPES = Shapes()

study = Study(
    "spt",
    question="What do routed feed-forward networks and sparse attention save when a model is fine-tuned, and what do they cost?",
    baseline="lora",
    figures=[
        Figure("loss", "loss on unseen text after (nats)"),
        Figure("first_loss", "loss before (nats)", detail=True),
        Figure("ffn_cpu_seconds", "feed-forward network, forward and backward", "s"),
        Figure("ffn_ratio", "a routed network's time over LoRA's dense one, by pairs", "x", detail=True),
        Figure("attention_cpu_seconds", "attention, forward and backward", "s"),
        Figure("attention_ratio", "sparse attention's time over fused attention's, by pairs", "x", detail=True),
        Figure("bytes", "kept by attention for its backward pass", "bytes"),
        Figure("ffn_bytes", "kept by the feed-forward network", "bytes"),
        Figure("layer_memory", "peak of attention's tensors, forward and backward", "bytes", detail=True),
        Figure("flops", "operations of a feed-forward network", "FLOP"),
        Figure("peak_memory", "peak resident memory of tuning", "bytes"),
        Figure("cpu_seconds", "processor time of tuning", "s"),
        Figure("recall", "true top keys that were kept", "%", "higher"),
        Figure("recall_untrained", "the same before code books and model were trained", "%", "higher", detail=True),
        Figure("recall_gain", "recall once the code books are trained over recall before", "x", "higher", detail=True),
        Figure("mass", "attention that the kept keys hold", "%", "higher"),
        Figure("mass_gain", "attention that the kept keys hold over what as many newest keys hold", "x", "higher", detail=True),
        Figure("load", "busiest block's share of tokens", "%", detail=True),
        Figure("parameters", "parameters that are trained", ""),
        Figure("training_loss", "training loss (nats)", "", "lower", detail=True),
    ],
    charts=[
        Curve("training_loss", over="step", title="Training loss"),
        Curve("attention_ratio", over="tokens", title="Time of sparse attention over fused attention's"),
        Bars(("ffn_cpu_seconds", "attention_cpu_seconds", "bytes"), title="Time and memory of a layer beside LoRA with eager attention"),
    ],
    time_limit=24 * 3600,
    seeds=3,
)
study.option("model", "", help="a Llama, Mistral, Qwen2 or OPT directory in place of the small language model")
study.option("text", "", help="a UTF-8 text file to learn, its end held out, in place of the presidents' addresses")
study.option("data", "", help=DATA_HELP)
study.option("held_out", 0, help=HELD_OUT_HELP, least=0)
study.option("steps", 0, help=STEPS_HELP, least=0)


@dataclass
class Task:
    """A trained model's directory, and other text in its tokens."""

    folder: Path
    train: Tensor
    test: Tensor
    scale: Scale
    steps: int

    def model(self, attention: str) -> Any:
        model = load_directory(self.folder, "float32", dense=True)[0]
        model.set_attn_implementation(attention)
        return model


@study.task
def task(scale: Scale, model: str, text: str, data: str, held_out: int = 0, steps: int = 0) -> Task:
    if data:
        corpus = corpus_of_pairs(data)
    elif text:
        corpus = text_corpus([text])
    else:
        addresses = load_state_of_the_union()[-ADDRESSES:]
        corpus = Corpus(tuple(addresses[:-UNSEEN]), tuple(addresses[-UNSEEN:]), "addresses of presidents")
    folder = Path(model) if model else fetch_small_lm()
    tokenizer = load_directory(folder, dense=True)[1] if model else load_tokenizer(folder)
    train, test = token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.validation)
    for part in (train, test):
        check_window(part, WINDOW)
    return Task(folder, train, test[: held_out or HELD_OUT], scale, steps or STEPS[scale])


def tune(task: Task, trial: Trial, attention: str, ffn: bool, keys: str) -> None:
    """Fine-tune by one recipe, judge on unseen text, and time a layer of SmolLM2's shapes (first seed)."""
    if trial.seed and (keys == "true" or (attention == "sdpa" and not ffn)):
        trial.note("not repeated", "this arm stands in no claim about seeds: with the first seed alone")
        return
    torch.manual_seed(trial.seed)
    sparse, steps, rate = attention == "spt", task.steps, LR[task.scale]
    config = SPTConfig(lora_r=RANK, sparse_attention=sparse, routed_ffn=ffn)
    model: Any = get_spt_model(task.model("sdpa" if sparse else attention), config).to(trial.device)
    windows = [
        draw_windows(task.train, BATCH[task.scale], WINDOW, torch.Generator().manual_seed(1000 * trial.seed + step)).to(trial.device)
        for step in range(steps)
    ]
    unseen = task.test[:WINDOW][None].to(trial.device)
    if attention == "eager":
        trial.log("first_loss", token_loss(task.model("sdpa").to(trial.device), task.test, window=WINDOW))
    with chosen_by(model, true_keys) if keys == "true" else contextlib.nullcontext():
        if sparse and keys == "codes":
            before = recall_and_mass_of(model, unseen)[0]
            model.train_code_books(windows[0][:2], BOOK_STEPS)
            trained = recall_and_mass_of(model, unseen)[0]
            trial.log("recall_untrained", before)
            trial.log("recall_gain", trained / before)
        told = trial.follow("training_loss", total=steps, text="loss", over="step")
        with one_thread() if trial.seed == 0 else contextlib.nullcontext(), trial.measure("tune") as cost:
            model.fine_tune(windows, steps, rate, tell=lambda _, loss: told(loss))
        if trial.seed == 0:
            trial.log("cpu_seconds", cost.figures()["cpu_seconds"])
        trial.log("peak_memory", cost.figures()["peak_memory"])
        trial.log("parameters", sum(each.numel() for _, each in model.trained()))
        trial.log("loss", token_loss(model, task.test, window=WINDOW))
        if sparse:
            recall, mass = recall_and_mass_of(model, unseen)
            trial.log("recall", recall)
            trial.log("mass", mass)
            if keys == "codes":
                with chosen_by(model, newest_keys):
                    trial.log("mass_gain", mass / recall_and_mass_of(model, unseen)[1])
    if ffn:
        trial.log("load", max(max(each.load) for each in model.stats(input_ids=unseen)))
    if trial.seed == 0 and keys == "codes":
        log_layer(trial, attention, ffn)


def recall_and_mass_of(model: SPTModel, ids: Tensor) -> tuple[float, float]:
    """(recall of the true top keys, kept attention mass), means over layers, on a window."""
    stats = model.stats(input_ids=ids)
    return sum(each.recall for each in stats) / len(stats), sum(each.mass for each in stats) / len(stats)


# A layer of SmolLM2's shapes


def layer_pair() -> tuple[RoutedGatedFFN, nn.Module, Tensor]:
    """(the routed network, peft's LoRA on the dense one with the same maps, an input that wants a gradient)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": SHAPES.hidden, "intermediate_size": SHAPES.channels}
    dense = with_lora(LlamaMLP(LlamaConfig(**sizes)), RANK).base_model.model
    x = torch.randn(1, SHAPES.tokens, SHAPES.hidden).requires_grad_()
    return RoutedGatedFFN(dense.gate_proj, dense.up_proj, dense.down_proj), dense, x


def heads(tokens: int = 0) -> list[Tensor]:
    """Queries, keys and values of a layer, with gradients wanted."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, SHAPES.heads, tokens or SHAPES.tokens, SHAPES.width, generator=draw).requires_grad_() for _ in range(3)]


def attention_of(kind: str) -> Any:
    """An attention's forward pass on queries, keys and values: "eager", "sdpa" or "spt", code comparison included."""
    if kind == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if kind == "eager":
        return eager
    torch.manual_seed(0)
    quantizer = ProductQuantizer(SHAPES.width)
    return lambda q, k, v: sparse_attention(q, k, v, lookup(quantizer.encode(q), quantizer.encode(k), 8))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def backward_of(run: Any, *inputs: Tensor) -> Any:
    def work() -> None:
        for each in inputs:
            each.grad = None
        run(*inputs).sum().backward()

    return work


def log_layer(trial: Trial, attention: str, ffn: bool) -> None:
    """Time, operations and kept bytes of a layer's two parts; of what is sparse also pairs with what it replaces."""
    routed, dense, x = layer_pair()
    network, run = routed if ffn else dense, attention_of(attention)
    with count_flops() as flops:
        network(x.detach())
    trial.log("flops", float(flops.total))
    with one_thread():
        trial.log("ffn_cpu_seconds", median_seconds(backward_of(network, x), 7, processor=True))
        trial.log("attention_cpu_seconds", median_seconds(backward_of(run, *heads()), 5, processor=True))
        if ffn and attention != "spt":
            trial.log("ffn_ratio", ratio_of_pairs(backward_of(routed, x), backward_of(dense, x), 9))
        for tokens in LENGTHS if attention == "spt" and not ffn else ():
            inputs = [z[:, :3].detach().requires_grad_() for z in heads(tokens)]  # three heads: a head takes what a head takes
            ours, fused = (backward_of(each, *inputs) for each in (run, attention_of("sdpa")))
            trial.log("attention_ratio", ratio_of_pairs(ours, fused, 3), tokens=tokens)
    with trial.tensors("layer_memory"):
        backward_of(run, *heads())()
    trial.log("ffn_bytes", kept_bytes(network, x))
    trial.log("bytes", kept_bytes(run, *heads()))


def kept_bytes(run: Any, *inputs: Tensor) -> float:
    """Bytes that a forward pass keeps for its backward pass beside its inputs and weights; of a lookup its indices too."""
    own = nn.ModuleList([nn.ParameterList(inputs), *([run] if isinstance(run, nn.Module) else [])])
    with saved_bytes(own) as saved:
        out = run(*inputs)
    del out
    return float(saved.total)


study.arm_table(
    tune,
    {
        "lora": {"attention": "eager", "ffn": False, "label": "LoRA, eager attention"},
        "lora-fused": {"attention": "sdpa", "ffn": False, "label": "LoRA, fused attention"},
        "spt-ffn": {"attention": "sdpa", "ffn": True, "label": "routed networks, fused attention"},
        "spt-attention": {"attention": "spt", "ffn": False, "label": "sparse attention, dense networks"},
        "spt": {"attention": "spt", "ffn": True, "label": "SPT"},
        "oracle": {"attention": "spt", "ffn": False, "keys": "true", "label": "the truly largest eighth"},
    },
    keys="codes",
)


# What the paper claims


@study.claim(
    "A routed network trains at least 1.5 x faster than LoRA's dense one at 1,024 tokens (SmolLM2's shapes)",
    paper="108.5 ms against 54.9 ms: 1.98 x",
)
def networks_are_quicker(results: Results) -> Any:
    return results.mean("ffn_ratio", "spt-ffn") <= 1 / 1.5


@study.claim("Sparse attention keeps at most a quarter of what eager attention keeps for its backward pass", paper="2.6 GB against 0.9 GB")
def attention_keeps_less(results: Results) -> Any:
    return results.ratio("bytes", "spt-attention", "lora") <= 0.25


@study.claim("Against fused attention it keeps no less", paper="not compared: fused attention came later")
def fused_keeps_less(results: Results) -> Any:
    return results.ratio("bytes", "spt-attention", "lora-fused") >= 1


@study.claim(
    "After tuning the loss is at most 0.15 nats above LoRA's",
    paper="comparable quality on MMLU",
    if_fails="a model this small needs every block, and a short tuning repairs little of what routers cut; attention alone costs next to nothing",
)
def loses_little(results: Results) -> Any:
    return results.no_worse("loss", "spt", "lora", 0.15, better="lower")


@study.claim(
    "Trained code books find at least 1.05 x as many of the true top keys as untrained ones",
    paper="the code books' loss trains them (no figure)",
)
def books_learn(results: Results) -> Any:
    return results.mean("recall_gain", "spt-attention") >= 1.05


@study.claim("The kept keys hold more of the attention than as many newest keys", paper="the largest weights are kept (no figure)")
def keeps_more_than_a_window(results: Results) -> Any:
    return results.mean("mass_gain", "spt-attention") > 1


@study.summary
def summary(results: Results) -> str:
    quicker = [f"{tokens:,}" for tokens in LENGTHS if results.mean("attention_ratio", "spt-attention", tokens=tokens).value < 1]
    even = f"at {', '.join(quicker)} tokens" if quicker else "at none of these lengths"
    ratios = ", ".join(f"{results.say('attention_ratio', 'spt-attention', tokens=tokens)} at {tokens:,}" for tokens in LENGTHS)
    return (
        f"At 1,024 tokens of SmolLM2's shapes a routed network took {results.say('ffn_ratio', 'spt-ffn')} of LoRA's time forward and "
        f"backward. Sparse attention kept {results.say('bytes', 'spt-attention')} for its backward pass, eager attention "
        f"{results.say('bytes', 'lora')}, fused attention {results.say('bytes', 'lora-fused')}; it took "
        f"{results.say('attention_cpu_seconds', 'spt-attention', beside='lora')} of eager attention's time, and of fused attention's {ratios}: "
        f"it is quicker {even}. Tuned, the loss on unseen text went from {results.say('first_loss', 'lora')} to {results.say('loss', 'lora')} "
        f"nats with LoRA and to {results.say('loss', 'spt')} with SPT ({results.say('loss', 'spt-ffn')} with routed networks alone, "
        f"{results.say('loss', 'spt-attention')} with sparse attention alone, {results.say('loss', 'oracle')} with the truly largest keys). "
        f"Codes found {results.say('recall', 'spt-attention')} of the true top keys, which hold {results.say('mass', 'spt-attention')} of the attention."
    )
