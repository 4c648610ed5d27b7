"""Training: losses of packed samples that are differentiable in every parameter, the indexer's included."""
