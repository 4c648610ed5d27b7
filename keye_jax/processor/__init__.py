"""Turns messages and media files into arrays: token ids, patches, grids and positions. Needs no JAX."""

from keye_jax.processor.model_inputs import ModelInputs, PromptPlan, PromptTokens
from keye_jax.processor.planner import ImagePlan, MediaPlanner, VideoPlan
from keye_jax.processor.processor import Processor
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
