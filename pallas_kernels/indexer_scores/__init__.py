from pallas_kernels.indexer_scores.api import indexer_scores

__all__ = ["indexer_scores"]
