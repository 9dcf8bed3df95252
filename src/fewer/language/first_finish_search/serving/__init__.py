"""First Finish Search over any OpenAI-compatible server, and the smallest such server over the engine."""
