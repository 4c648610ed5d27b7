"""How far below a row's highest logit top-k and top-p reach."""

import jax
from jax.typing import ArrayLike

from pallas_kernels.checks import FLOAT32, INTEGERS, Array, Result, Signature
from pallas_kernels.dispatch import dispatch

MOST_TOP_K = 2048
"""Most tokens that top_k leaves."""


def nucleus(
    logits: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    active: ArrayLike,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The highest logit of each row, and how far below it the last token is that top-k and top-p leave.

    A row keeps the tokens of which `highest - logits <= span` holds. top_p counts the probabilities among the tokens
    that top_k leaves (Holtzman et al., arXiv 1904.09751). The last token stays whose probability is needed to reach
    top_p, and so do tokens that are as likely as it.

    A sum of probabilities is exact to about 1e-5 of itself. Where more than 2,048 tokens stay, "xla" and "mosaic_tpu"
    find the last one to within 2^-12 of its logit.

    Args:
      logits: float32 `[b, vocab]`.
      top_k: int32 `[b]`, the number of tokens that stay, at most `MOST_TOP_K`; 0 for all.
      top_p: float32 `[b]`, above 0; 1 and more for all.
      active: int32 `[b]`; rows with 0 get any numbers, and cost less.
      implementation: None, "mosaic_gpu", "mosaic_tpu" or "xla".

    Returns:
      highest: float32 `[b]`.
      span: float32 `[b]`, infinite where all tokens stay.

    Raises:
      ArgumentError: a shape or dtype does not fit. `implementation` is no implementation's name.
      UnsupportedError: the implementation does not exist, or none that may run supports the arguments.
    """
    per_row = Array("b", INTEGERS)
    signature = Signature(
        "nucleus",
        {
            "logits": Array("b vocab", FLOAT32, gradient=False),
            "top_k": per_row,
            "top_p": Array("b", FLOAT32, gradient=False),
            "active": per_row,
        },
        (Result("b", "float32"), Result("b", "float32")),
    )
    arrays = {"logits": logits, "top_k": top_k, "top_p": top_p, "active": active}
    return dispatch(signature, implementation, arrays)
