"""What one layer does: its update in closed form, its inputs, and the predictor on it."""
