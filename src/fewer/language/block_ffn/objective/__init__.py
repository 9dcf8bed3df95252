"""What is trained for besides the next token: neighbours that share experts, chunks that need few, and how much that weighs."""
