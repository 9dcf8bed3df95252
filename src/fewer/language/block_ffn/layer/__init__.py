"""The layer: router, experts, and the ways in which they are multiplied."""
