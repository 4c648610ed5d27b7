"""Holding a checkpoint to recorded results."""
