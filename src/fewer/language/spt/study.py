"""Fine-tuning with LoRA, dense or sparse: a trained model moved to other text, and what a layer of SmolLM2's shapes costs.

LoRA runs with eager attention (what the paper compares with) and with fused attention (what everybody has today). The clock and the
memory of a layer are taken with the first seed alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import load_state_of_the_union
from fewer.fitting import evaluating, fit_steps
from fewer.language._shared.model_directory import load_directory, load_tokenizer
from fewer.language._shared.timing import one_thread
from fewer.language._shared.trained import DATA_HELP, corpus_of_pairs
from fewer.language.spt.attention import sparse_attention
from fewer.language.spt.model import SPTConfig, SPTModel, get_spt_model
from fewer.language.spt.peers import chosen_by, newest_keys, true_keys
from fewer.language.spt.quantizer import ProductQuantizer, lookup
from fewer.language.spt.routed import RoutedGatedFFN
from fewer.meters import count_flops, median_seconds
from fewer.study import Bars, Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.tasks import fetch_small_lm, token_loss
from fewer.tasks.language_corpus import Corpus, text_corpus, token_stream
from fewer.tasks.lm_training import check_window, draw_windows

STEPS = {Scale.QUICK: 30, Scale.FULL: 5120}
BATCH = {Scale.QUICK: 2, Scale.FULL: 4}
WINDOW, LR = 512, 1e-3
HELD_OUT = 16_384
ADDRESSES, UNSEEN = 12, 2
SHAPES = {"hidden_size": 576, "intermediate_size": 1536, "heads": 9, "tokens": 1024}  # SmolLM2-135M's
RANK = 16

study = Study(
    "spt",
    question="What do routed feed-forward networks and sparse attention save when a model is fine-tuned, and what do they cost?",
    baseline="lora",
    figures=[
        Figure("loss", "loss on unseen text after (nats)"),
        Figure("first_loss", "loss before (nats)", detail=True),
        Figure("ffn_cpu_seconds", "feed-forward network, forward and backward", "s"),
        Figure("attention_cpu_seconds", "attention, forward and backward", "s"),
        Figure("bytes", "kept by attention for its backward pass", "bytes"),
        Figure("ffn_bytes", "kept by the feed-forward network", "bytes", detail=True),
        Figure("peak_memory", "peak resident memory of tuning", "bytes"),
        Figure("cpu_seconds", "processor time of tuning", "s"),
        Figure("flops", "operations of a feed-forward network", "FLOP"),
        Figure("recall", "true top keys that were kept", "%", "higher"),
        Figure("recall_untrained", "the same before the code books were trained", "%", "higher", detail=True),
        Figure("mass", "attention that the kept keys hold", "%", "higher"),
        Figure("mass_newest", "that as many newest keys hold", "%", "higher", detail=True),
        Figure("load", "busiest block's share of tokens", "%", detail=True),
        Figure("trained", "parameters that are trained", ""),
        Figure("training_loss", "training loss (nats)", "", "lower", detail=True),
    ],
    charts=[
        Curve("training_loss", over="step", title="Training loss"),
        Tradeoff("loss", "ffn_cpu_seconds", title="Loss against the time of a feed-forward network"),
        Bars(("ffn_cpu_seconds", "attention_cpu_seconds", "bytes"), title="Time and memory of a layer beside LoRA with eager attention"),
    ],
    time_limit=24 * 3600,
    seeds=3,
)
study.option("model", "", help="a Llama, Mistral, Qwen2 or OPT directory in place of the small language model")
study.option("text", "", help="a UTF-8 text file to learn, its end held out, in place of the presidents' addresses")
study.option("data", "", help=DATA_HELP)


@dataclass
class Task:
    """A trained model's directory, and other text in its tokens."""

    folder: Path
    train: Tensor
    test: Tensor
    scale: Scale

    def model(self, attention: str) -> Any:
        model = load_directory(self.folder, "float32")[0]
        model.set_attn_implementation(attention)
        return model


@study.task
def task(scale: Scale, model: str, text: str, data: str) -> Task:
    if data:
        corpus = corpus_of_pairs(data)
    elif text:
        corpus = text_corpus([text])
    else:
        addresses = load_state_of_the_union()[-ADDRESSES:]
        corpus = Corpus(tuple(addresses[:-UNSEEN]), tuple(addresses[-UNSEEN:]), "addresses of presidents")
    folder = Path(model) if model else fetch_small_lm()
    tokenizer = load_directory(folder)[1] if model else load_tokenizer(folder)
    train, test = token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.validation)
    for part in (train, test):
        check_window(part, WINDOW)
    return Task(folder, train, test[:HELD_OUT], scale)


def tune(task: Task, trial: Trial, attention: str, ffn: bool, keys: str) -> None:
    """Fine-tune by one recipe, judge on unseen text, and time a layer of SmolLM2's shapes (first seed)."""
    torch.manual_seed(trial.seed)
    sparse = attention == "spt"
    model: Any = get_spt_model(
        task.model("sdpa" if sparse else attention), SPTConfig(lora_r=RANK, sparse_attention=sparse, routed_ffn=ffn)
    ).to(trial.device)
    windows = [
        draw_windows(task.train, BATCH[task.scale], WINDOW, torch.Generator().manual_seed(1000 * trial.seed + step))
        for step in range(STEPS[task.scale])
    ]
    trial.log("first_loss", token_loss(task.model("sdpa").to(trial.device), task.test, window=WINDOW))
    with chosen_by(model, true_keys) if keys == "true" else contextlib.nullcontext():
        if sparse and keys == "codes":
            trial.log("recall_untrained", mean_recall(model, windows[0][:1].to(trial.device))[0])
            model.train_code_books(windows[0][:2].to(trial.device))
        told = trial.follow("training_loss", total=len(windows), text="loss", over="step")
        optimizer = torch.optim.AdamW([each for _, each in model.trained()], lr=LR, weight_decay=0.1)
        model.train()
        with one_thread(), trial.measure("tune") as cost:
            loss_of = lambda ids: model(input_ids=ids.to(trial.device), labels=ids.to(trial.device), use_cache=False).loss  # noqa: E731
            fit_steps(optimizer, loss_of, windows, len(windows), clip=1.0, tell=lambda _, loss: told(loss))
        model.eval()
        trial.log("cpu_seconds", cost.figures()["cpu_seconds"])
        trial.log("peak_memory", cost.figures()["peak_memory"])
        trial.log("trained", sum(each.numel() for _, each in model.trained()))
        trial.log("loss", token_loss(model, task.test, window=WINDOW))
        if sparse:
            recall, mass = mean_recall(model, windows[0][:1].to(trial.device))
            trial.log("recall", recall)
            trial.log("mass", mass)
            with chosen_by(model, newest_keys):
                trial.log("mass_newest", mean_recall(model, windows[0][:1].to(trial.device))[1])
    if ffn:
        trial.log("load", max(float(network.load.max()) for network in model.networks))
    if trial.seed == 0:
        log_layer(trial, attention, ffn, keys)


def mean_recall(model: SPTModel, ids: Tensor) -> tuple[float, float]:
    """(recall, kept mass), means over layers, on a window."""
    with torch.no_grad(), evaluating(model):
        model(input_ids=ids)
    stats = model.stats()
    return sum(each.recall for each in stats) / len(stats), sum(each.mass for each in stats) / len(stats)


# A layer of SmolLM2's shapes


def lora_linear(into: int, out: int) -> nn.Module:
    """A frozen linear map with peft's LoRA on it."""
    import peft

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(into, out, bias=False)

    wrapped = peft.get_peft_model(One(), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["map"]))  # pyright: ignore[reportArgumentType]
    return wrapped.base_model.model.map  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


class DenseLora(nn.Module):
    """The gated feed-forward network with peft's LoRA on its three maps."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate, self.up = (lora_linear(hidden_size, intermediate_size) for _ in range(2))
        self.down = lora_linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def layer_pair() -> tuple[RoutedGatedFFN, DenseLora, Tensor]:
    """(the routed network, the dense one with the same maps, an input that wants a gradient)."""
    torch.manual_seed(0)
    dense = DenseLora(SHAPES["hidden_size"], SHAPES["intermediate_size"])
    x = torch.randn(1, SHAPES["tokens"], SHAPES["hidden_size"]).requires_grad_()
    return RoutedGatedFFN(dense.gate, dense.up, dense.down), dense, x


def heads() -> list[Tensor]:
    """Queries, keys and values of a layer, with gradients wanted."""
    width = SHAPES["hidden_size"] // SHAPES["heads"]
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, SHAPES["heads"], SHAPES["tokens"], width, generator=draw).requires_grad_() for _ in range(3)]


def attention_of(kind: str) -> Any:
    """An attention's forward pass on queries, keys and values: "eager", "sdpa" or "spt", code comparison and loss included."""
    if kind == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if kind == "eager":
        seen = torch.ones(SHAPES["tokens"], SHAPES["tokens"], dtype=torch.bool).tril()
        return lambda q, k, v: (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    torch.manual_seed(0)
    quantizer = ProductQuantizer(SHAPES["hidden_size"] // SHAPES["heads"])

    def spt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, lookup(quantizer.encode(q), quantizer.encode(k), 8))

    return spt


def backward_of(run: Any, *inputs: Tensor) -> Any:
    def work() -> None:
        for each in inputs:
            each.grad = None
        run(*inputs).sum().backward()

    return work


def log_layer(trial: Trial, attention: str, ffn: bool, keys: str) -> None:
    routed, dense, x = layer_pair()
    network, run = routed if ffn else dense, attention_of(attention)
    with count_flops() as flops, torch.no_grad():
        network(x)
    trial.log("flops", float(flops.total))
    with one_thread():
        trial.log("ffn_cpu_seconds", median_seconds(backward_of(network, x), 7, processor=True))
        if keys == "codes":
            trial.log("attention_cpu_seconds", median_seconds(backward_of(run, *heads()), 5, processor=True))
    trial.log("ffn_bytes", kept_bytes(network, x))
    if keys == "codes":
        trial.log("bytes", kept_bytes(run, *heads()))


def kept_bytes(run: Any, *inputs: Tensor) -> float:
    """Bytes that a forward pass keeps for its backward pass beside its inputs and weights, each storage once; a lookup's indices too."""
    seen: dict[int, int] = {}
    own = {each.untyped_storage().data_ptr() for each in inputs}
    own |= {each.untyped_storage().data_ptr() for each in (run.parameters() if isinstance(run, nn.Module) else [])}

    def keep(each: Tensor) -> Tensor:
        storage = each.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        out = run(*inputs)
    csr = getattr(getattr(out, "grad_fn", None), "csr", None)
    return float(sum(seen.values()) + (csr.indices.nbytes + csr.indptr.nbytes if csr is not None else 0))


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
    return results.ratio("ffn_cpu_seconds", "spt-ffn", "lora") <= 1 / 1.5


@study.claim("Sparse attention keeps at most a quarter of what eager attention keeps for its backward pass", paper="2.6 GB against 0.9 GB")
def attention_keeps_less(results: Results) -> Any:
    return results.ratio("bytes", "spt-attention", "lora") <= 0.25


@study.claim("Against fused attention it keeps no less", paper="not compared: fused attention came later")
def fused_keeps_less(results: Results) -> Any:
    return results.ratio("bytes", "spt-attention", "lora-fused") >= 1


@study.claim(
    "After tuning the loss is at most 0.15 nats above LoRA's",
    paper="comparable quality on MMLU",
    if_fails="a model this small needs every block and most of its attention, and thirty steps repair little of what is cut",
)
def loses_little(results: Results) -> Any:
    return results.no_worse("loss", "spt", "lora", 0.15, better="lower")


@study.claim(
    "Trained code books find at least 1.05 x as many of the true top keys as untrained ones",
    paper="the code books' loss trains them (no figure)",
)
def books_learn(results: Results) -> Any:
    found, before = (results.mean(name, "spt-attention") for name in ("recall", "recall_untrained"))
    return found >= 1.05 * before.value


@study.claim("The kept keys hold more of the attention than as many newest keys", paper="the largest weights are kept (no figure)")
def keeps_more_than_a_window(results: Results) -> Any:
    return results.mean("mass", "spt-attention") > results.mean("mass_newest", "spt-attention").value


@study.summary
def summary(results: Results) -> str:
    return (
        f"At 1,024 tokens of SmolLM2's shapes a routed network took {results.say('ffn_cpu_seconds', 'spt-ffn', beside='lora')} of LoRA's time forward and "
        f"backward. Sparse attention kept {results.say('bytes', 'spt-attention')} for its backward pass, eager attention "
        f"{results.say('bytes', 'lora')}, fused attention {results.say('bytes', 'lora-fused')}; it took {results.say('attention_cpu_seconds', 'spt-attention')} "
        f"(eager {results.say('attention_cpu_seconds', 'lora')}, fused {results.say('attention_cpu_seconds', 'lora-fused')}). Tuned, the loss on unseen text fell "
        f"from {results.say('first_loss', 'lora')} to {results.say('loss', 'lora')} nats with LoRA and to {results.say('loss', 'spt')} with SPT "
        f"({results.say('loss', 'spt-ffn')} with routed networks alone, {results.say('loss', 'spt-attention')} with sparse attention alone, "
        f"{results.say('loss', 'oracle')} with the truly largest keys). Codes found {results.say('recall', 'spt-attention')} of the true top keys, "
        f"which hold {results.say('mass', 'spt-attention')} of the attention."
    )
