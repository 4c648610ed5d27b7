"""From messages and files to arrays: token ids, patches, grids and positions."""

from keye_jax.processor.processor import FrameShare, ModelInputs, Processor, PromptPlan, VideoPlan
from keye_jax.processor.prompt import Detokenizer

__all__ = ["Detokenizer", "FrameShare", "ModelInputs", "Processor", "PromptPlan", "VideoPlan"]
