"""Models of mlx-lm whose answers depend on how a prompt is divided into chunks, made independent of that.

phi3small: its block-sparse layers add the boolean causal mask to the scores, so that a token attends to later
ones of its chunk; and they count the blocks of queries back from the end of the last block of keys, not from their own
positions. plamo3: its mask shows one token more than its cache keeps; the cache of a window follows the mask here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxserver.engine.mlx import mx, nn

from mlx_lm.models import phi3small, plamo3


class BlockSparseAttention(phi3small.Attention):  # type: ignore[misc]
    """phi3small's attention over local blocks and every n-th block, by the positions of queries and keys."""

    def _block_sparse_attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None
    ) -> mx.array:
        """queries [B, heads, L, dim], keys and values [B, KV heads, S, dim] -> [B, heads, L, dim].

        mask: not needed, as the model has its sequences one by one: the last query is at the last key's position.
        """
        visible = self._visible(queries.shape[2], keys.shape[2])
        attended: mx.array = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=visible)
        return attended

    def _visible(self, num_queries: int, num_keys: int) -> mx.array:
        """Whether a query attends to a key: [heads, L, S]."""
        at = mx.arange(num_keys - num_queries, num_keys)[None, :, None]
        of = mx.arange(num_keys)[None, None]
        block, key_block = at // self.blocksparse_block_size, of // self.blocksparse_block_size
        heads = mx.arange(1, self.n_heads + 1)[:, None, None]
        is_local = block - key_block < self.blocksparse_num_local_blocks
        visible: mx.array = (of <= at) & (is_local | ((key_block + heads) % self.blocksparse_vert_stride == 0))
        return visible


def correct_chunk_masks(model: nn.Module) -> None:
    """Change a model of these kinds in place; leave any other one as it is."""
    for layer in model.modules():
        if type(layer) is phi3small.Attention and layer.block_sparse:
            layer.__class__ = BlockSparseAttention
    if isinstance(model, plamo3.Model):
        own: Any = model
        own.config = replace(own.config, sliding_window=own.config.window_size + 1)  # for make_cache() alone
