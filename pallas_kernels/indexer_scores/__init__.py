from pallas_kernels.indexer_scores.api import indexer_scores
from pallas_kernels.indexer_scores.quantize import hadamard, quantize

__all__ = ["hadamard", "indexer_scores", "quantize"]
