"""Whole models: their operands, their linear layers cast and packed, and how far their answers move."""
