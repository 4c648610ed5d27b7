"""Attention and experts."""

from tests.tpu_compile.cases import Case

CASES: list[Case] = []
