"""The network: masked layers, and what they make of a time and a video's number."""
