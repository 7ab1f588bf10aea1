"""Attention as pure functions: which keys a query sees, in which softmax, by which kernel.

Three patterns cover every model here. `Causal` is the decoder's. `Packed` is the CLIP text
tower's: many short texts side by side in one row behind one shared start token (reference.md,
fact 2). `Full` is the image tower's. `Cached` is the first two over again, for rows that are read
in pieces. A query may have a `Memory`: extra keys that belong to it alone and share its softmax
(VALM, section 3.3; the fusion layer of BLIND-VALM, and the <eos> side tokens of the text tower).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.models.precision import einsum_fp32


@struct.dataclass
class Memory:
    """K extra keys and values for each query, visible to that query alone.

    k_BTKNH, v_BTKNH: projected; bias_N: added to their logits, per head, or None.
    """

    k_BTKNH: Array
    v_BTKNH: Array
    bias_N: Array | None = None


@struct.dataclass
class Dropout:
    """Dropout of attention weights, over text and memory together."""

    key: Array
    rate: float = struct.field(pytree_node=False)

    def __call__(self, weights: Array) -> Array:
        """Zeroes a share `rate` of the weights and scales the others by 1 / (1 - rate)."""
        # Two 16-bit draws from each random word: making the words costs more than the attention.
        size = weights.shape[-1]
        words = jax.random.bits(self.key, (*weights.shape[:-1], -(-size // 2)), jnp.uint32)
        pairs = jax.lax.bitcast_convert_type(words, jnp.uint16)
        draws = pairs.reshape(*weights.shape[:-1], -1)[..., :size]
        keep = draws >= round(self.rate * 2**16)
        return jnp.where(keep, weights / (1.0 - self.rate), 0.0)


@struct.dataclass
class Attended:
    """Result of an attention: out_BTNH, and the weight each query gave its memory, or None.

    memory_share_BNT: of each head; memory_share_BT: their mean, without a gradient.
    """

    out_BTNH: Array
    memory_share_BT: Array | None = None
    memory_share_BNT: Array | None = None


def joint_attention(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    mask_BTS: Array,
    scale: float,
    memory: Memory | None = None,
    memory_mask_BT: Array | None = None,
    dropout: Dropout | None = None,
) -> Attended:
    """softmax(scale * q [k ; memory.k]^T) [v ; memory.v], one softmax in fp32 (VALM, eq. 5).

    mask_BTS: True where a query sees a key (each must see one); its leading axis may be 1.
    memory_mask_BT: True where a query sees its memory; None: everywhere.
    """
    scores_BNTS = einsum_fp32("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    lowest = jnp.finfo(jnp.float32).min
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS * scale, lowest)
    if memory is None:
        weights_BNTS = jax.nn.softmax(scores_BNTS)
        if dropout is not None:
            weights_BNTS = dropout(weights_BNTS)
        weights_BNTS = weights_BNTS.astype(v_BSNH.dtype)
        return Attended(jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH))

    scores_BNTK = scale * einsum_fp32("btnh,btknh->bntk", q_BTNH, memory.k_BTKNH)
    if memory.bias_N is not None:
        scores_BNTK = scores_BNTK + memory.bias_N[None, :, None, None]
    if memory_mask_BT is not None:
        scores_BNTK = jnp.where(memory_mask_BT[:, None, :, None], scores_BNTK, lowest)
    weights = jax.nn.softmax(jnp.concatenate([scores_BNTS, scores_BNTK], axis=-1))
    length = k_BSNH.shape[1]
    share_BNT = jnp.sum(weights[..., length:], axis=-1)
    share_BT = jnp.mean(share_BNT, axis=1)
    if dropout is not None:
        weights = dropout(weights)
    weights = weights.astype(v_BSNH.dtype)
    out_BTNH = jnp.einsum("bnts,bsnh->btnh", weights[..., :length], v_BSNH)
    out_BTNH += jnp.einsum("bntk,btknh->btnh", weights[..., length:], memory.v_BTKNH)
    return Attended(out_BTNH, jax.lax.stop_gradient(share_BT), share_BNT)


@struct.dataclass
class Causal:
    """Each position sees itself and what came before, except, without a memory, invalid positions.

    valid_BT: True at real tokens, or None when all are (or when pads only end a row, where the
    causal mask hides them already). grounded_BT: True where a position sees its memory, None:
    everywhere. kernel: "xla", or "cudnn" for plain attention, which then takes neither a mask nor
    dropout; a memory always goes through XLA.
    """

    valid_BT: Array | None = None
    grounded_BT: Array | None = None
    kernel: str = struct.field(pytree_node=False, default="xla")

    def attend(
        self,
        q_BTNH: Array,
        k_BTNH: Array,
        v_BTNH: Array,
        *,
        scale: float,
        memory: Memory | None = None,
        dropout: Dropout | None = None,
    ) -> Attended:
        """Attention under this pattern; see `joint_attention`."""
        length = q_BTNH.shape[1]
        if self.kernel == "cudnn" and memory is None:
            if self.valid_BT is not None or dropout is not None:
                raise ValueError("the cuDNN kernel takes neither a padding mask nor dropout")
            out_BTNH = jax.nn.dot_product_attention(
                q_BTNH, k_BTNH, v_BTNH, scale=scale, is_causal=True, implementation="cudnn"
            )
            return Attended(out_BTNH)
        mask_BTS = jnp.tril(jnp.ones((length, length), bool))[None]
        # The reference's fusion layer drops the padding mask; only pads inside a row can tell.
        if self.valid_BT is not None and memory is None:
            mask_BTS = mask_BTS & self.valid_BT[:, None, :]
        return joint_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            mask_BTS=mask_BTS,
            scale=scale,
            memory=memory,
            memory_mask_BT=self.grounded_BT,
            dropout=dropout,
        )


@struct.dataclass
class Packed:
    """Many short causal texts in one row, behind one start token at position 0.

    A token sees the start token, and its own segment up to itself. Because CLIP's text tower is
    causal, that is all it would see alone in a row of its own. segment_BT: number of the segment
    of each position, 0 for the start token, rising; longest: most tokens of a segment. Keys are
    gathered in blocks of at least that length, so cost grows with T, not its square.

    With `side`, the second half of the positions are <eos> tokens, the t-th of which sees what
    position t sees, and itself: what the tower would say if the text ended there.
    """

    segment_BT: Array
    longest: int = struct.field(pytree_node=False)
    side: bool = struct.field(pytree_node=False, default=False)

    def attend(
        self,
        q_BTNH: Array,
        k_BTNH: Array,
        v_BTNH: Array,
        *,
        scale: float,
        memory: Memory | None = None,
        dropout: Dropout | None = None,
    ) -> Attended:
        """Attention under this pattern; takes neither memory nor dropout."""
        if memory is not None or dropout is not None:
            raise ValueError("packed attention takes neither a memory nor dropout")
        length = self.segment_BT.shape[1]
        k_main, v_main = k_BTNH[:, :length], v_BTNH[:, :length]
        # The start token sees only itself.
        tokens = self._tokens(q_BTNH[:, 1:length], k_main, v_main, scale, None)
        main_BTNH = jnp.concatenate([v_main[:, :1], tokens], axis=1)
        if not self.side:
            return Attended(main_BTNH)
        q_side, k_side, v_side = (x[:, length:] for x in (q_BTNH, k_BTNH, v_BTNH))
        itself = Memory(k_side[:, :, None], v_side[:, :, None])
        empty = joint_attention(  # the <eos> right behind the start token: the empty text
            q_side[:, :1],
            k_main[:, :1],
            v_main[:, :1],
            mask_BTS=jnp.ones((1, 1, 1), bool),
            scale=scale,
            memory=jax.tree.map(lambda x: x[:, :1], itself),
        )
        behind = jax.tree.map(lambda x: x[:, 1:], itself)
        tokens = self._tokens(q_side[:, 1:], k_main, v_main, scale, behind)
        return Attended(jnp.concatenate([main_BTNH, empty.out_BTNH, tokens], axis=1))

    def _tokens(
        self, q_BSNH: Array, k_BTNH: Array, v_BTNH: Array, scale: float, memory: Memory | None
    ) -> Array:
        """Attention of the S tokens behind the start token; keys and values include it."""
        batch, length = q_BSNH.shape[:2]
        block, blocks, reach = packed_blocks(length, self.longest)

        def cut(x: Array) -> Array:
            """[B, S, ...] to [B * blocks, block, ...], the tail filled with zeros."""
            pad = [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, pad).reshape(batch * blocks, block, *x.shape[2:])

        def window(x: Array) -> Array:
            """[B, 1 + S, ...] to the keys of each block: start token, block before, itself."""
            own = cut(x[:, 1:]).reshape(batch, blocks, block, *x.shape[2:])
            start = jnp.broadcast_to(x[:, None, :1], (batch, blocks, 1, *x.shape[2:]))
            parts = [start, own]
            if reach == 2:
                shift = [(0, 0), (1, 0)] + [(0, 0)] * (own.ndim - 2)
                parts.insert(1, jnp.pad(own[:, :-1], shift))
            joined = jnp.concatenate(parts, axis=2)
            return joined.reshape(batch * blocks, reach * block + 1, *x.shape[2:])

        # Segments are numbered from 1, filling is 0: no token's segment.
        query_segment = cut(self.segment_BT[:, 1:])[:, :, None]
        key_segment = window(self.segment_BT)[:, None, :]
        query_at = jnp.arange(block)[None, :, None] + (reach - 1) * block
        key_at = jnp.arange(-1, reach * block)[None, None, :]
        same = (query_segment == key_segment) & (key_at <= query_at)
        attended = joint_attention(
            cut(q_BSNH),
            window(k_BTNH),
            window(v_BTNH),
            mask_BTS=same | (key_at < 0),
            scale=scale,
            memory=None if memory is None else jax.tree.map(cut, memory),
        )
        out = attended.out_BTNH
        return out.reshape(batch, blocks * block, *out.shape[2:])[:, :length]


@struct.dataclass
class Full:
    """Every position sees every position: an encoder."""

    def attend(
        self,
        q_BTNH: Array,
        k_BTNH: Array,
        v_BTNH: Array,
        *,
        scale: float,
        memory: Memory | None = None,
        dropout: Dropout | None = None,
    ) -> Attended:
        """Attention under this pattern; takes neither memory nor dropout."""
        if memory is not None or dropout is not None:
            raise ValueError("full attention takes neither a memory nor dropout")
        mask_BTS = jnp.ones((1, q_BTNH.shape[1], k_BTNH.shape[1]), bool)
        return joint_attention(q_BTNH, k_BTNH, v_BTNH, mask_BTS=mask_BTS, scale=scale)


@struct.dataclass
class Cached:
    """New positions of rows whose earlier keys and values are kept, each in a slot.

    slot_BT: where those of each new position are put; `capacity`, the number of slots: nowhere, it
    is the filling of a row that gets fewer. mask_BTS: True where a new position sees a slot, its
    own among them. window_BW: slots of each row, of which alone the mask tells then; None: of all.
    With `side`, the second half of the positions are <eos> tokens as in `Packed`, and these are not
    kept.
    """

    slot_BT: Array
    mask_BTS: Array
    capacity: int = struct.field(pytree_node=False)
    window_BW: Array | None = None
    side: bool = struct.field(pytree_node=False, default=False)

    def write(self, cache_BNSH: Array, x_BTNH: Array) -> Array:
        """The keys, or values, that were kept and those of the new positions.

        Heads come first: a product over the slots of each head then reads them as they lie.
        """
        row_B1 = jnp.arange(len(x_BTNH))[:, None]
        new_BTNH = x_BTNH[:, : self.slot_BT.shape[1]]
        return cache_BNSH.at[row_B1, :, self.slot_BT].set(new_BTNH, mode="drop")

    def attend(
        self,
        q_BTNH: Array,
        k_BTNH: Array,
        v_BTNH: Array,
        *,
        k_BNSH: Array,
        v_BNSH: Array,
        scale: float,
        memory: Memory | None = None,
        dropout: Dropout | None = None,
    ) -> Attended:
        """Attention over what is kept, k_BNSH and v_BNSH: the result of `write`. No dropout."""
        if dropout is not None or (self.side and memory is not None):
            raise ValueError("attention over a cache takes no dropout, beside <eos> no memory")
        length = self.slot_BT.shape[1]
        if self.window_BW is not None:
            at = self.window_BW[:, None, :, None]
            k_BNSH, v_BNSH = (jnp.take_along_axis(x, at, 2, mode="clip") for x in (k_BNSH, v_BNSH))
        see = functools.partial(
            joint_attention,
            k_BSNH=k_BNSH.swapaxes(1, 2),
            v_BSNH=v_BNSH.swapaxes(1, 2),
            mask_BTS=self.mask_BTS,
            scale=scale,
        )
        main = see(q_BTNH[:, :length], memory=memory)
        if not self.side:
            return main
        itself = Memory(k_BTNH[:, length:, None], v_BTNH[:, length:, None])
        side = see(q_BTNH[:, length:], memory=itself)
        return Attended(jnp.concatenate([main.out_BTNH, side.out_BTNH], axis=1))


Pattern = Causal | Packed | Full | Cached


def packed_blocks(length: int, longest: int) -> tuple[int, int, int]:
    """How `Packed` cuts rows: queries of a block, blocks, and blocks of keys that each reads."""
    block = min(1 << (longest - 1).bit_length(), length)
    blocks = -(-length // block)
    return block, blocks, 2 if blocks > 1 else 1  # a segment lies in a block and the one before
