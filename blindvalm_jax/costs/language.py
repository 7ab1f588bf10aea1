"""Products of a token of the language-model objective, from a run's settings."""

from __future__ import annotations

from blindvalm_jax.config import Config, fusion_layers
from blindvalm_jax.costs import products
from blindvalm_jax.costs.products import Product
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.decoder import padded_vocab


def token(
    config: Config,
    *,
    vocab_size: int,
    tower: TowerConfig | None,
    tower_length: int,
    vectors: int = 0,
) -> tuple[Product, ...]:
    """Products of a token on the devices.

    tower_length: positions of a packed row without the start token (S); vectors: that are compared
    with each token by exact search in the step (M), 2 M E. `train.remat` auto counts as none.
    """
    decoder, train, length = config.decoder, config.train, config.data.sequence_length
    layers = fusion_layers(config) if tower is not None else ()
    found = [
        *products.blocks(
            "decoder",
            layers=decoder.layers,
            width=decoder.width,
            mlp_width=decoder.mlp_width or 4 * decoder.width,
            keys=length,
            seen=products.causal(length),
            remat=train.remat,
        ),
        products.head(
            width=decoder.width,
            vocab_size=vocab_size,
            rows=padded_vocab(vocab_size, decoder.vocab_multiple),
            chunked=bool(train.loss_chunk),
        ),
    ]
    if tower is None:
        return tuple(found)
    found += products.fusion(
        layers=len(layers),
        width=decoder.width,
        neighbours=config.grounding.neighbours,
        feature_width=tower.projection,
        remat=train.remat,
    )
    if config.grounding.search != "prepared":
        row = products.packed_tower(
            tower, length=tower_length, eos=config.grounding.readout == "eos"
        )
        found += products.over(row, 1 / length)
    if vectors:
        compared = 2.0 * vectors * tower.projection
        found.append(Product(part="search", flops=compared, times=products.FORWARD))
    return tuple(found)
