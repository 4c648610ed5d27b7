"""Weights of fewer bits: schemes, how files say them, quantisation, and the parameters of a model."""
