"""The operations of sparse attention and mixture-of-experts layers. They do not need `keye_jax`.

Every operation is one public function in a folder of its own, with `implementation=None`: the best implementation that
runs here and supports the arguments runs. A name forces one; `dispatch.OPERATIONS` lists the names an operation has.

An operation's folder shows its platforms: `api.py` is the public function, `xla.py` the portable implementation, and
`mosaic_gpu`, `cudnn` and `mosaic_tpu` are a file or a folder each. `gpu/` and `tpu.py` hold what the kernels of one
platform share. `shapes.py` holds the sizes of the released model.

Dimensions in docstrings: b batch, t query, s key position, n heads, k key/value heads, d head dim, e experts, f expert
hidden size, p pages, m pages of one sequence.

Keys live in pages: an array `[p, page_size, ...]`, and a page table int32 `[b, m]`. Its entry `[b, i]` is the number of
the page that holds positions `i * page_size` to `(i + 1) * page_size - 1` of sequence b. The identity table is a
contiguous sequence.
"""
