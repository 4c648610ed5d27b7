"""Formulas for the work of a step: floating point operations and bytes moved of one device."""

from __future__ import annotations

from keye_jax.config import KeyeConfig
from keye_jax.runtime.memory import weight_bytes
from keye_jax.sharding import MeshRules, StepSharding

_UNION = 8192
"""Keys that 16 neighbouring queries select together at most, as the technical report has them at 128K tokens."""


class Work:
    """Formulas for one device's share of the work, all layers together."""

    def __init__(self, config: KeyeConfig, rules: MeshRules, chunk: int, indexer_dtype: str | None):
        self.config, self.rules, self.chunk = config, rules, chunk
        self.item = config.jax_dtype.itemsize
        sa = config.sa_config
        self.index_row = sa.indexer_head_dim + 4 if indexer_dtype else sa.indexer_head_dim * self.item
        self.kv_row = 2 * config.num_key_value_heads * config.head_dim * self.item // rules.size("kv_heads")
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
