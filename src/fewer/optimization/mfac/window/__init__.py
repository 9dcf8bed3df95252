"""The window of gradients that slides: its products, its factor, and the kernel that reads it on a GPU."""
