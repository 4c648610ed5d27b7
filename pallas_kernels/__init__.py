"""Sparse-attention and mixture-of-experts operations, one folder each, usable without `keye_jax`.

Every operation is one public function with `implementation=None`: the best one that supports the arguments runs; a
name forces that one. Dimensions in docstrings: b batch, t query, s key position, n heads, k key/value heads, d head
dim, e experts, p pages, m pages of one sequence.

Keys live in pages: an array `[p, page_size, ...]` and a page table int32 `[b, m]` that says which page holds positions
`i * page_size` to `(i + 1) * page_size - 1` of sequence b. A contiguous sequence is the identity table.
"""
