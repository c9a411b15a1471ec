"""Torch optimizers that measure gradient noise and act on it."""

__version__ = "0.1.0"
