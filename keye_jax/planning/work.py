"""Formulas for the work of a step: floating point operations and bytes moved of one device."""

from __future__ import annotations

from keye_jax.config import KeyeConfig
from keye_jax.runtime.memory import index_row_bytes, kv_row_bytes, weight_bytes
from keye_jax.sharding import MeshRules, StepSharding

_UNION = 8192
"""Keys that 16 neighbouring queries select together at most, as the technical report has them at 128K tokens."""


class Work:
    """Formulas for one device's share of the work, all layers together."""

    def __init__(
        self, config: KeyeConfig, rules: MeshRules, chunk: int, indexer_dtype: str | None, cache_dtype: str | None
    ):
        self.config, self.rules, self.chunk = config, rules, chunk
        self.item, self.float8 = config.jax_dtype.itemsize, indexer_dtype is not None
        self.index_row = index_row_bytes(config, indexer_dtype)
        self.kv_row = kv_row_bytes(config, rules, cache_dtype)
        self.expert = 3 * config.hidden_size * config.moe_intermediate_size

    def _token_flops(self, owners: int, ranks: int, heads: int) -> float:
        """Of a layer's products, for one token, when `ranks` devices share the tokens and `owners` the experts."""
        c, sa = self.config, self.config.sa_config
        projections = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads) / heads
        indexer = c.hidden_size * ((sa.indexer_num_heads + 1) * sa.indexer_head_dim + sa.indexer_num_heads)
        experts = c.num_experts_per_tok * self.expert / owners
        return 2 * ((projections + indexer + c.hidden_size * c.num_experts) / ranks + experts)

    def _attention_flops(self, keys: float, parts: int, heads: int) -> float:
        """Of a layer, for one query that sees `keys` keys, shared by `parts` devices along queries or keys."""
        c, sa = self.config, self.config.sa_config
        scores = 2 * sa.indexer_num_heads * (sa.indexer_head_dim + 1) * keys
        return (scores + 4 * c.num_attention_heads * c.head_dim * min(keys, sa.topk) / heads) / parts

    def _shares(self, step: StepSharding) -> tuple[int, int, int]:
        """Devices that share the tokens of one prompt, or of a batch; the experts; and the heads."""
        tokens = step.query_sequence if step.reads_prompts else step.rows
        owners = tuple(dict.fromkeys((*tokens, *step.experts, *step.expert_hidden)))
        return step.size(tokens), step.size(owners), step.size(step.heads)

    def prefill(self, context: int, tokens: int) -> tuple[float, float]:
        """Operations and bytes of the last chunk, whose queries see the whole context."""
        c, step = self.config, StepSharding.prefill(self.rules)
        ranks, owners, heads = self._shares(step)
        flops = tokens * (self._token_flops(owners, ranks, heads) + self._attention_flops(context, ranks, heads))
        gathered = context * (self.kv_row + self.index_row) * (2 if step.gathers_pages else 0)
        groups = tokens / ranks / 16
        keys = groups * (min(context, _UNION) * self.kv_row + context * self.index_row / 8)
        weights = self._read_weights("embed_tokens")
        return flops * c.num_hidden_layers, weights + (gathered + keys) * c.num_hidden_layers

    @property
    def ranks_of_one_head(self) -> int | None:
        """Devices that share the queries of a prompt; None if they share its heads, or index keys are float8."""
        ranks, _, heads = self._shares(StepSharding.prefill(self.rules))
        return ranks if heads == 1 and not self.float8 else None

    def prefill_but_attention(self, tokens: int) -> tuple[float, float]:
        """Operations and bytes of a chunk, without index scores, selection and attention."""
        ranks, owners, heads = self._shares(StepSharding.prefill(self.rules))
        flops = tokens * self._token_flops(owners, ranks, heads) * self.config.num_hidden_layers
        return flops, self._read_weights("embed_tokens")

    def decode(self, batch: int, context: int) -> tuple[float, float]:
        """Operations and bytes of one step."""
        c, step = self.config, StepSharding.decode(self.rules)
        ranks, owners, heads = self._shares(step)
        parts = step.size(step.pages)
        layer = self._token_flops(owners, ranks, heads) + self._attention_flops(context, parts, heads)
        head = c.hidden_size * c.vocab_size / step.size(step.vocab)
        flops = batch * (layer * c.num_hidden_layers + 2 * head)
        chosen = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** batch
        experts = weight_bytes(c, self.rules, only=("gate_up_proj", "down_proj"))
        others = self._read_weights() - experts - head * self.item
        keys = batch / parts * (context * self.index_row + min(context, c.sa_config.topk) * self.kv_row)
        return flops, others + experts * chosen + keys * c.num_hidden_layers

    def _read_weights(self, *but: str) -> int:
        """Bytes of the weights that a step reads."""
        unread = weight_bytes(self.config, self.rules, only=("vision", "projector", *but))
        return weight_bytes(self.config, self.rules) - unread
