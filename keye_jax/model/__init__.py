"""The network in flax.nnx. Modules own parameters; every step is a function of (parameters, inputs, cache)."""
