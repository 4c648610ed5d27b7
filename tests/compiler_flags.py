"""XLA's flags for all processes of the tests. Programs are shared by processes with the same flags."""

COMPILER_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
"""A program is compiled in one part: other tests keep the other cores busy, and parts take more work in all."""
