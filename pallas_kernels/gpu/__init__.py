"""What the kernels for NVIDIA GPUs share: sizes of the hardware, MLIR helpers, and per-thread (SIMT) kernel bodies."""
