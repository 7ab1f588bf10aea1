"""Matrix products of a model, counted: a multiply-add is 2 FLOPs; lookups, norms, softmax are 0.

Letters as everywhere (L blocks of width D, MLP F, T keys, V vocabulary, K vectors of width E). Per
position and forward: blocks L (8 D^2 + 4 D F + 4 T D), head 2 D V, fusion 4 K D^2 for keys and
values and 4 K D for their scores and sums, with an adapter 2 K E D (Kaplan et al. 2020, table 1,
with head and attention counted). Training: 3 x, 2 x where nothing flows back, 1 x what is frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from blindvalm_jax.models.attention import packed_blocks
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.models.vision import VisionConfig

FORWARD = 1.0  # what is frozen
NO_GRADIENT_BACK = 2.0  # forward, and the gradient of the weights
TRAINED = 3.0  # and that of the input


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Products of one kind; FLOPs of one token (or row, pair, image) in a forward pass.

    flops: as the program computes them, padding and masked keys included; seen: the share of them
    that counts, of a causal mask half; times: passes in training, the forward one included; again:
    forward passes more where the backward pass recomputes it.
    """

    part: str
    flops: float
    seen: float = 1.0
    times: float = TRAINED
    again: float = 0.0

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass that count."""
        return self.flops * self.seen

    @property
    def training(self) -> float:
        """FLOPs of training that count: what a budget is made of."""
        return self.forward * self.times

    @property
    def full(self) -> float:
        """Those of training with what counts for nothing: masked keys and padding."""
        return self.flops * self.times

    @property
    def hardware(self) -> float:
        """All that is computed: every key, and what is recomputed."""
        return self.flops * (self.times + self.again)

    def times_over(self, count: float) -> Product:
        """The same for so many positions."""
        return dataclasses.replace(self, flops=self.flops * count)


def over(products: Iterable[Product], count: float) -> tuple[Product, ...]:
    """Products of a position as those of `count` positions."""
    return tuple(product.times_over(count) for product in products)


def blocks(
    part: str,
    *,
    layers: int,
    width: int,
    mlp_width: int,
    keys: float,
    seen: float = 1.0,
    times: float = TRAINED,
    remat: str = "none",
) -> tuple[Product, ...]:
    """A stack of blocks on one position.

    keys: computed for it, of which the share `seen` counts; remat: as `train.remat`.
    """
    matrix, full = 2.0 * layers * width, float(remat == "full")
    return (
        Product(part=part, flops=matrix * 4 * width, times=times, again=full),
        Product(part=part, flops=matrix * mlp_width, times=times, again=full),
        # Nothing in the backward pass asks for the output of a block's last product.
        Product(part=part, flops=matrix * mlp_width, times=times),
        Product(
            part=part,
            flops=matrix * 2 * keys,
            seen=seen,
            times=times,
            again=float(remat in ("dots", "full")),
        ),
    )


def causal(length: int) -> float:
    """Share of all keys that a position sees under a causal mask: (T + 1) / 2T."""
    return (length + 1) / (2 * length)


def head(*, width: int, vocab_size: int, rows: int, chunked: bool) -> Product:
    """Logits over a table of `rows`, V of them real; chunked: computed again going back."""
    flops = 2.0 * width * rows
    return Product(part="head", flops=flops, seen=vocab_size / rows, again=float(chunked))


def fusion(
    *, layers: int, width: int, neighbours: int, feature_width: int, remat: str = "none"
) -> tuple[Product, ...]:
    """What fusion layers add to plain blocks, for the K vectors of a token.

    A gradient flows through keys and values back to the gain and bias of the norm before them, so
    these cost 3 x although the vectors are frozen; an adapter, which comes first, 2 x.
    """
    vectors, full = layers * neighbours, float(remat == "full")
    found = [
        Product(part="fusion projections", flops=vectors * 4.0 * width**2, again=full),
        Product(
            part="fusion scores and values",
            flops=vectors * 4.0 * width,
            again=float(remat in ("dots", "full")),
        ),
    ]
    if feature_width != width:
        adapter = 2.0 * vectors * feature_width * width
        adapted = Product(part="fusion adapter", flops=adapter, times=NO_GRADIENT_BACK, again=full)
        found.append(adapted)
    return tuple(found)


def packed_tower(tower: TowerConfig, *, length: int, eos: bool) -> tuple[Product, ...]:
    """The frozen text tower on a packed row of `length` tokens and its start token.

    A position counts the start token, itself and half of the longest segment; computed are the
    blocks of keys that `attention.Packed` gathers. eos: as many positions again for the readout,
    each with its own key.
    """
    block, count, reach = packed_blocks(length, tower.longest_segment)
    queries, keys = block * count, block * reach + 1

    def side(part: str, own: int) -> tuple[Product, ...]:
        computed = queries * (keys + own) / (length + 1)
        counted = tower.longest_segment / 2 + 1 + own
        # Of a row shorter than a segment no more than is computed.
        one = _tower_blocks(tower, part, keys=computed, seen=min(1.0, counted / computed))
        return over(one, length + 1)

    read = Product(
        part="tower", flops=(length + 1) * 2.0 * tower.width * tower.projection, times=FORWARD
    )
    return (*side("tower", 0), *(side("readout", 1) if eos else ()), read)


def padded_tower(tower: TowerConfig, *, useful: float, eos: bool) -> tuple[Product, ...]:
    """The tower as the reference runs it, for one useful token: each text in a row of its own.

    Rows are padded to the tower's context; useful: the share of positions that hold a token.
    """
    one = _tower_blocks(tower, "tower", keys=tower.context)
    read = Product(part="tower", flops=2.0 * tower.width * tower.projection, times=FORWARD)
    again = _tower_blocks(tower, "readout", keys=tower.context) if eos else ()
    return over((*one, *again, read), 1 / useful)


def _tower_blocks(
    tower: TowerConfig, part: str, *, keys: float, seen: float = 1.0
) -> tuple[Product, ...]:
    return blocks(
        part,
        layers=tower.layers,
        width=tower.width,
        mlp_width=tower.mlp_width,
        keys=keys,
        seen=seen,
        times=FORWARD,
    )


def image_tower(vision: VisionConfig) -> tuple[Product, ...]:
    """The image tower on one image, trained: patches S - 1 = (R/p)^2, S (8 d^2 + 4 d f + 4 S d)."""
    part, width = "image tower", vision.width
    found: list[Product] = []
    if vision.kind == "vit":
        patches = (vision.image_size // vision.patch) ** 2
        pixels = 3 * vision.patch**2
        found.append(
            Product(part=part, flops=2.0 * patches * pixels * width, times=NO_GRADIENT_BACK)
        )
        one = blocks(
            part,
            layers=vision.layers,
            width=width,
            mlp_width=vision.mlp_width,
            keys=patches + 1,
        )
        found += over(one, patches + 1)
    else:
        size, inputs = vision.image_size, 3
        for outputs in vision.channels:
            size = -(-size // 2)
            times = NO_GRADIENT_BACK if inputs == 3 else TRAINED
            found.append(
                Product(part=part, flops=2.0 * 9 * size**2 * inputs * outputs, times=times)
            )
            inputs = outputs
        found.append(Product(part=part, flops=2.0 * size**2 * inputs * width))
    return (*found, Product(part=part, flops=2.0 * width * vision.projection))


def pair(clip: ClipConfig) -> tuple[Product, ...]:
    """An image with its caption through both towers, which are trained."""
    text = clip.text
    one = blocks(
        "text tower",
        layers=text.layers,
        width=text.width,
        mlp_width=text.mlp_width,
        keys=text.context,
        seen=0.5,
    )
    read = Product(part="text tower", flops=2.0 * text.width * text.projection)
    return (*image_tower(clip.vision), *over((*one, read), text.context))
