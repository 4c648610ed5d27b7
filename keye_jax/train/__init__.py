"""Training: stages from files, data, the optimiser, LoRA, checkpoints, and the loop. Needs `keye-jax[train]`."""
