"""Tiny studies that the tests of the house run for real."""
