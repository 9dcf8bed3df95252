"""Speculative decoding, in which sparse chunks pay: a draft's tokens are verified in one pass, which reads the union of their experts alone."""

from fewer.language._shared.speculative import GenerateOutput, speculative_generate

__all__ = ["GenerateOutput", "speculative_generate"]
