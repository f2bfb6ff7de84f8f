"""Distributed large-batch self-supervised and metric learning for cell images."""

__version__ = "0.1.0"
