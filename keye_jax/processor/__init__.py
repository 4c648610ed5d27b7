"""Turns messages and media files into arrays: token ids, patches, grids and positions. Needs no JAX."""

from keye_jax.processor.processor import (
    ImagePlan,
    MediaPlanner,
    ModelInputs,
    Processor,
    PromptPlan,
    PromptTokens,
    VideoPlan,
)
from keye_jax.processor.prompt import Detokenizer

__all__ = [
    "Detokenizer",
    "ImagePlan",
    "MediaPlanner",
    "ModelInputs",
    "Processor",
    "PromptPlan",
    "PromptTokens",
    "VideoPlan",
]
