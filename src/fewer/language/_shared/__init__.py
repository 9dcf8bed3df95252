"""What methods on language models share: directories read safely, decoder layers, feed-forward surgery, LoRA, questions, timing."""
