"""Training: losses of packed samples that are differentiable in every parameter, and the stages that use them.

forward_losses(model, batch, ...)  what is minimised (`forward.py`)
StageConfig.from_file(path)        what a file in `configs/train` says (`config.py`)
session.train(stage, ...)          a run, from a checkpoint and a file of samples to another checkpoint
"""
