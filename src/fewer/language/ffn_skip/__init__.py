"""Decode with fewer feed-forward blocks: a token whose state has stopped moving leaves out the rest of the middle layers' FFNs.

For people who generate text with a Llama-like model and wait for its weights to be read: two thirds of a layer's weights are its FFN, and in
the middle of a deep model an FFN hardly turns the token's state. Only FFNs are left out, never attention, so every layer has its entry in
the cache for every token; nothing is trained, and `generate` is called as before.

When to use it: the model is deep and well trained (its middle layers' similarity, which `calibrate` shows, is near 1), decoding is one or a
few rows at a time, and some loss of quality is a fair price. When not: the model is small or young, rows are many (a row that runs has the
weights read for all), or what takes long is the prompt, which runs in full.

- sim_l = cos(h', h' + FFN_l(norm2(h'))), for each token, in float32; h' = h + Attn_l(norm1(h)).
- after the prompt and a warm-up, in layers [cold_start, cold_end): from the first layer with sim_l >= threshold on, the next `max_skips`
  layers (all, by default) leave h' as it is. The next token begins anew.

Source: FFN-SkipLLM, arXiv 2404.03865 (EMNLP 2024).

>>> import torch
>>> from fewer.language.ffn_skip import calibrate, ffn_skip
>>> from fewer.tasks import micro_lm
>>> model = micro_lm()
>>> text = torch.randint(1, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
>>> config, report = calibrate(model, text, target_skip=0.25, tokens=32)
>>> report.reached, (config.cold_start, config.cold_end)
(True, (1, 3))
>>> with ffn_skip(model, config) as stats:
...     written = model.generate(text[:1], max_new_tokens=40, min_new_tokens=40, do_sample=False)
>>> stats.tokens, stats.ratio == stats.skipped_blocks / (4 * stats.tokens)
(14, True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
