"""The network in flax.nnx. Modules own parameters; each step is a function of (parameters, inputs, pages)."""
