"""Measurements of speed and memory on this machine, for the README's tables."""
