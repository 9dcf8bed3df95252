"""What methods that learn without a backward pass share: the twins trained by backpropagation that they are held against."""
