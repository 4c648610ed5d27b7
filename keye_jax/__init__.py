"""Keye-VL-2.0-30B-A3B in JAX."""

__version__ = "0.1.0"
