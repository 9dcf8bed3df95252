"""A tiny Llama with a tokenizer, and text for it."""

from __future__ import annotations

import torch


def tiny_llama(seed: int = 0, hidden: int = 64, intermediate: int = 96, vocabulary: int = 128):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # a fresh model says nearly the same of every token
    return model


def ids(rows: int = 2, length: int = 32, seed: int = 0, vocabulary: int = 128) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def directory_of(model, folder, vocabulary: int = 128):
    """The model with a tokenizer of words w0, w1, ... as a directory, and a text file for it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<unk>": vocabulary - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder / "model")
    drawn = torch.randint(vocabulary - 1, (400,), generator=torch.Generator().manual_seed(9)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in drawn))
    return folder / "model", folder / "text.txt"
