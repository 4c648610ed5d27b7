"""From messages and files to arrays: token ids, patches, grids and positions."""

from keye_jax.processor.processor import ModelInputs, Plan, Processor, VideoPlan
from keye_jax.processor.prompt import Detokenizer

__all__ = ["Detokenizer", "ModelInputs", "Plan", "Processor", "VideoPlan"]
