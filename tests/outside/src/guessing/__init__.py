"""Guessing the middle of some numbers from a sample: a third party's method, and the study that the tests of the house run."""
