"""Media of requests: planned and decoded in processes of their own, named by their content, kept. Needs no JAX."""

from keye_jax.engine.media.embeddings import EmbeddingCache
from keye_jax.engine.media.events import Broken, Finished, MediaEvent, Pixels, Planned
from keye_jax.engine.media.frame_cache import FrameCache
from keye_jax.engine.media.hashes import BLOCK_TOKENS, block_hashes
from keye_jax.engine.media.work import Decoded, Medium, Prompt
from keye_jax.engine.media.workers import BYTE_BUDGET, PIECE_PATCHES, MediaWorkers

__all__ = [
    "BLOCK_TOKENS",
    "BYTE_BUDGET",
    "PIECE_PATCHES",
    "Broken",
    "Decoded",
    "EmbeddingCache",
    "Finished",
    "FrameCache",
    "MediaEvent",
    "MediaWorkers",
    "Medium",
    "Pixels",
    "Planned",
    "Prompt",
    "block_hashes",
]
