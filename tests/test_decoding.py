"""Rows read in pieces give the logits of whole rows, at a fixed number of compilations."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from blindvalm_jax import config, partitioning
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.decoding import cached, tower_text
from blindvalm_jax.decoding.cached import Reader, State
from blindvalm_jax.decoding.tower_text import TowerText
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import retrieval, segments
from blindvalm_jax.grounding.images import on_devices
from blindvalm_jax.grounding.text import TowerInput
from blindvalm_jax.models.attention import Cached, Dropout, Memory
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.models.decoder import Decoder
from blindvalm_jax.objectives.language_model import Batch, Model
from blindvalm_jax.trained import TrainedModel
from tests import small_models, small_text

LENGTH, CAPACITY, IMAGES, K = 40, 44, 30, 3
COUNTS = np.array([40, 23, 31, 6])  # real tokens of the rows
# fp32; the logits are of size 10, attention sums over other numbers of keys
ATOL = 1e-4


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


class Case(NamedTuple):
    """A model, what it needs, random rows, and their logits [B, T, V] read whole."""

    model: Model
    params: Any
    frozen: dict[str, Any]
    text: TowerText | None
    tokens: np.ndarray
    whole: np.ndarray


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return partitioning.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def tower_reads() -> TowerText:
    """Segments of 1 to 16 tokens; the tower's ids are another order of the language model's."""
    rng = np.random.default_rng(7)
    longest = small_models.TOWER.longest_segment
    minimum = rng.choice([1, 3, 7, longest], 64, p=[0.04, 0.1, 0.1, 0.76]).astype(np.int16)
    rank = np.where(minimum < longest, minimum, 127).astype(np.int8)
    separators = segments.Separators(rank=rank, minimum=minimum, longest=longest)
    ids = rng.integers(0, 60, small_models.VOCAB).astype(np.int32)
    return TowerText(separators=separators, ids=ids)


def model_of(variant: str, mesh: Mesh) -> Model:
    """GPT-2 of three blocks in one scan, or a fusion block and what is made of its results."""
    positions = "sinusoidal" if variant.endswith("sinusoidal") else "learned"
    shape = dataclasses.replace(small_models.CONFIG, positions=positions, max_positions=48)
    if variant.startswith("gpt"):
        return Model(small_models.decoder(shape))
    shape = dataclasses.replace(shape, layers=2)
    width = small_models.TOWER.projection
    fused = small_models.decoder(shape, fusion_layers=(0,), memory_width=width)
    readout: Readout = "eos" if variant == "blind_eos" else "token"
    search = on_devices(mesh, count=IMAGES, neighbours=K) if variant == "valm" else None
    return Model(fused, TextTower(small_models.TOWER), readout=readout, search=search)


def image_vectors() -> np.ndarray:
    shape = (IMAGES, small_models.TOWER.projection)
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


@functools.cache
def case(variant: str) -> Case:
    mesh = mesh_of()
    model = model_of(variant, mesh)
    params = small_models.random_params(model.init, seed=1)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, small_models.VOCAB, (len(COUNTS), LENGTH)).astype(np.int32)
    frozen: dict[str, Any] = {}
    text, tower_input = None, None
    if model.tower is not None:
        text, frozen["tower"] = tower_reads(), small_models.tower_params()
        ids = text.ids[tokens]
        starts = segments.starts(ids, rule="causal", separators=text.separators, counts=COUNTS)
        assert starts[0].sum() > 3
        tower_input = TowerInput(jnp.asarray(ids), jnp.asarray(starts))
    if model.search is not None:
        frozen["index"] = retrieval.place_keys(image_vectors(), mesh)
    here = jnp.asarray(tokens)
    batch = Batch(here, here, jnp.ones(here.shape), tower_input)
    return Case(model, params, frozen, text, tokens, read_whole(model, params, frozen, batch))


def read_whole(model: Model, params: Any, frozen: Any, batch: Batch) -> np.ndarray:
    """Logits as training computes them."""

    @jax.jit
    def run(params: Any, frozen: Any, batch: Batch) -> Any:
        z_BTKE = model.features(frozen, batch)
        return model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)

    return np.asarray(run(params, frozen, batch))


@functools.cache
def shared_reader(variant: str) -> Reader:
    given = case(variant)
    return Reader(given.model, capacity=CAPACITY, text=given.text)


def read(
    case: Case, reader: Reader, pieces: Sequence[np.ndarray], width: int
) -> tuple[np.ndarray, State]:
    """Logits of the rows read in pieces, [B] tokens of each row at a time, and the last state."""
    state = reader.start(case.frozen, rows=len(case.tokens))
    found = np.full_like(case.whole, np.nan)
    for counts in pieces:
        tokens = np.zeros((len(counts), width), np.int32)
        before = np.asarray(state.length_B)
        for row, count in enumerate(counts):
            tokens[row, :count] = case.tokens[row, before[row] : before[row] + count]
        logits, state = reader.extend(case.params, case.frozen, state, tokens, counts)
        for row, count in enumerate(counts):
            found[row, before[row] : before[row] + count] = np.asarray(logits)[row, :count]
    return found, state


def assert_same(case: Case, found: np.ndarray) -> None:
    real = np.arange(LENGTH) < COUNTS[:, None]
    assert np.isfinite(found[real]).all()
    np.testing.assert_allclose(found[real], case.whole[real], rtol=0, atol=ATOL)


def pieces_of(width: int, *, seed: int = 0) -> list[np.ndarray]:
    """Random numbers of tokens for each row, none for some, until all are read."""
    rng, left, pieces = np.random.default_rng(seed), COUNTS.copy(), []
    while left.any():
        pieces.append(np.minimum(rng.integers(0, width + 1, len(left)), left))
        left -= pieces[-1]
    return pieces


@pytest.mark.parametrize("variant", ["gpt_learned", "gpt_sinusoidal", "blind_eos", "valm"])
def test_pieces_of_any_size_give_the_logits_of_whole_rows(variant: str) -> None:
    """At every position; rows of different lengths, one row gets nothing while another goes on."""
    given = case(variant)
    reader = shared_reader(variant)
    at_once, state = read(given, reader, [COUNTS], LENGTH)
    assert_same(given, at_once)
    chunks, chunk_state = read(given, reader, pieces_of(7), 7)
    assert_same(given, chunks)
    singles = [(at < COUNTS).astype(int) for at in range(LENGTH)]
    one_by_one, single_state = read(given, reader, singles, 1)
    assert_same(given, one_by_one)
    for other in (chunk_state, single_state):
        np.testing.assert_array_equal(other.length_B, COUNTS)
        np.testing.assert_array_equal(other.segment_B, state.segment_B)


def test_a_token_more_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    given = case("blind_eos")
    reader = shared_reader("blind_eos")
    state = reader.start(given.frozen, rows=4)
    _, state = reader.extend(given.params, given.frozen, state, given.tokens[:, :1])
    assert (state.segment_B > 0).any()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x * 3 + 1)(jnp.zeros(3))
        assert "Finished XLA compilation" in caplog.text
        caplog.clear()
        for at in range(1, 20):
            counts = [1, 1, 1, at % 2]
            _, state = reader.extend(
                given.params, given.frozen, state, given.tokens[:, at : at + 1], counts
            )
        jax.block_until_ready(state.caches)
    assert "Finished XLA compilation" not in caplog.text


def test_rows_are_taken_and_repeated_and_each_goes_on_alone() -> None:
    """Twice the same row with other tokens behind: the first goes on as it was read whole."""
    given, rows = case("blind_eos"), [2, 0, 2, 1]
    reader = shared_reader("blind_eos")
    state = reader.start(given.frozen, rows=4)
    for at in range(0, 21, 7):
        _, state = reader.extend(given.params, given.frozen, state, given.tokens[:, at : at + 7])
    for wrong in ([0, 4], [-1]):
        with pytest.raises(UserError, match="of a state of 4"):
            reader.take(state, wrong)
    state = reader.take(state, rows)
    tokens = given.tokens[rows, 21:23]
    tokens[2] = (tokens[2] + 1) % small_models.VOCAB
    for at in range(2):
        logits, state = reader.extend(given.params, given.frozen, state, tokens[:, at : at + 1])
        found, want = np.asarray(logits)[:, 0], given.whole[rows, 21 + at]
        np.testing.assert_allclose(found[[0, 1, 3]], want[[0, 1, 3]], rtol=0, atol=ATOL)
        assert np.abs(found[2] - want[2])[: small_models.VOCAB].max() > 0.1


def test_prefill_gives_the_last_logits_and_a_consumed_state_is_gone() -> None:
    given = case("gpt_learned")
    reader = shared_reader("gpt_learned")
    counts = np.array([5, 1, 3, 4])
    logits, state = reader.prefill(
        given.params, given.frozen, given.tokens[:, :5], counts, logits="last"
    )
    assert logits.shape[:2] == (4, 1)
    want = given.whole[np.arange(4), counts - 1]
    np.testing.assert_allclose(logits[:, 0], want, rtol=0, atol=ATOL)
    tokens = given.tokens[np.arange(4), counts][:, None]
    kept, _ = reader.extend(given.params, given.frozen, state, tokens)
    consumed, after = reader.extend(given.params, given.frozen, state, tokens, consume=True)
    np.testing.assert_allclose(consumed, kept, rtol=0, atol=1e-6)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.caches))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after.caches))


def test_a_step_can_be_looped_under_jit() -> None:
    """As well as called; this variant is compared here alone, its pieces are VALM's queries."""
    given = case("blind_token")
    reader = shared_reader("blind_token")
    start = reader.start(given.frozen, rows=4)

    @jax.jit
    def read_on(params: Any, frozen: Any, state: State, tokens_BT: jax.Array) -> Any:
        def one(state: State, token_B: jax.Array) -> tuple[State, jax.Array]:
            count_B = jnp.ones_like(token_B)
            logits, state = reader.step(params, frozen, state, token_B[:, None], count_B)
            return state, logits[:, 0]

        return jax.lax.scan(one, state, tokens_BT.T)[1].swapaxes(0, 1)

    found = read_on(given.params, given.frozen, start, jnp.asarray(given.tokens))
    assert_same(given, np.asarray(found))
    assert_same(given, read(given, reader, [COUNTS], LENGTH)[0])


def test_rows_and_heads_are_split_over_a_mesh() -> None:
    """The same logits, and every device keeps a quarter of each cache, also of a wider one."""
    mesh = mesh_of(data=2, tensor=2)
    index = {"index": retrieval.place_keys(image_vectors(), mesh)}
    whole = case("valm")
    given = whole._replace(model=model_of("valm", mesh), frozen=whole.frozen | index)
    reader = Reader(given.model, capacity=CAPACITY, text=given.text, mesh=mesh)
    pieces = [np.minimum(COUNTS, 12), np.clip(COUNTS - 12, 0, 12)]
    found, state = read(given, reader, pieces, 12)
    read_so_far = np.isfinite(found).all(-1)
    np.testing.assert_array_equal(read_so_far.sum(1), [24, 23, 24, 6])
    np.testing.assert_allclose(found[read_so_far], whole.whole[read_so_far], rtol=0, atol=ATOL)
    wide = Reader(given.model, capacity=CAPACITY + 4, text=given.text, mesh=mesh).widened(state)
    for cache, wider in zip(*map(jax.tree.leaves, (state.caches, wide.caches)), strict=True):
        for one in (cache, wider):
            assert one.addressable_shards[0].data.size * 4 == one.size
        assert wider.shape[2] == cache.shape[2] + 4
        np.testing.assert_array_equal(wider[:, :, : cache.shape[2]], cache)
    with pytest.raises(UserError, match="3 rows, not a positive multiple"):
        reader.start(given.frozen, rows=3)
    with pytest.raises(UserError, match="1 rows, not a positive multiple"):
        reader.take(state, [2])


@pytest.mark.parametrize("seed", range(4))
def test_segments_of_pieces_start_where_those_of_whole_rows_do(seed: int) -> None:
    """Random separators, rows and pieces; also what is left open is the same."""
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(2, 20))
    minimum = rng.integers(1, longest + 1, 30).astype(np.int16)
    minimum[rng.random(30) < 0.8] = longest
    rank = np.zeros(30, np.int8)
    separators = segments.Separators(rank=rank, minimum=minimum, longest=longest)
    ids = rng.integers(0, 30, (4, LENGTH))
    want = segments.starts(ids, rule="causal", separators=separators)
    run = jax.jit(functools.partial(tower_text.positions, minimum=minimum))
    place, open_, done = np.zeros_like(ids), np.zeros(4, np.int32), np.zeros(4, int)
    for counts in pieces_of(9, seed=seed):
        piece = rng.integers(0, 30, (4, 9))
        for row, count in enumerate(counts):
            piece[row, :count] = ids[row, done[row] : done[row] + count]
        found, open_ = run(piece, np.arange(9) < counts[:, None], open_)
        for row, count in enumerate(counts):
            place[row, done[row] : done[row] + count] = np.asarray(found)[row, :count]
        done += counts
    for row, count in enumerate(COUNTS):
        np.testing.assert_array_equal(place[row, :count] == 1, want[row, :count])
        assert place[row].max() <= longest
        ended = count == LENGTH or want[row, count]
        assert count == LENGTH or open_[row] == (0 if ended else place[row, count - 1])


def test_a_finished_run_reads_its_own_text_in_pieces() -> None:
    """CLIP's tokenizer, its separators, and the tower's ids of the language model's."""
    given = finished_run()
    texts = ["The cat sat on the mat. A cat, so: (on) it; the mat!", "the AT&T mat?"]
    batch = given.batch(texts)
    whole = read_whole(given.model, given.params, given.frozen, batch)
    assert batch.tower is not None
    assert np.asarray(batch.tower.starts_BS)[0].sum() > 2
    counts = 1 + np.asarray(batch.weights_BT).sum(1).astype(int)
    reader = cached.reader(given, capacity=int(counts.max()))
    found, _ = reader.prefill(given.params, given.frozen, batch.tokens_BT, counts)
    for row, count in enumerate(counts):
        np.testing.assert_allclose(found[row, :count], whole[row, :count], rtol=0, atol=ATOL)


def finished_run(rule: str = "causal") -> TrainedModel:
    """A BLIND-VALM of random weights as if it were read from a run."""
    tokenizer = small_text.small_clip()
    size = tokenizer.vocab_size - tokenizer.lm_offset
    tower = dataclasses.replace(
        small_models.TOWER, vocab_size=size, start_id=size - 2, end_id=size - 1
    )
    decoder = Decoder(
        dataclasses.replace(small_models.CONFIG, layers=1),
        small_models.PAPER_FUSION,
        vocab_size=tokenizer.vocab_size,
        fusion_layers=(0,),
        memory_width=tower.projection,
    )
    model = Model(decoder, TextTower(tower))
    settings = config.parse(config.default())
    grounding = dataclasses.replace(settings.grounding, segments=rule)
    return TrainedModel(
        model=model,
        params=small_models.random_params(model.init, seed=3),
        frozen={"tower": small_models.tower_params(tower)},
        tokenizer=tokenizer,
        tower_tokenizer=None,
        settings=dataclasses.replace(settings, grounding=grounding),
        step=0,
        mesh=mesh_of(),
        images=None,
    )


def test_the_reference_rule_is_refused() -> None:
    with pytest.raises(UserError, match="read in pieces: under grounding.segments=reference"):
        cached.reader(finished_run("reference"), capacity=8)


def test_a_tower_with_a_tokenizer_of_its_own_is_refused() -> None:
    given = dataclasses.replace(finished_run(), tower_tokenizer=small_text.small_clip())
    with pytest.raises(
        UserError, match="cannot be read in pieces: the tower has a tokenizer of its own"
    ):
        cached.reader(given, capacity=8)


def test_what_does_not_fit_is_refused_and_the_state_stays_good() -> None:
    given = case("gpt_learned")
    reader = shared_reader("gpt_learned")
    state = reader.start(given.frozen, rows=4)
    _, state = reader.extend(given.params, given.frozen, state, given.tokens, COUNTS)
    seven = given.tokens[:, :7]
    with pytest.raises(UserError, match="row 0 has 40 tokens and gets 7 more, the cache holds 44"):
        reader.extend(given.params, given.frozen, state, seven)
    for tokens in (seven[:2], seven[0], seven[:, :0]):
        with pytest.raises(UserError, match="tokens of shape .* for 4 rows"):
            reader.extend(given.params, given.frozen, state, tokens)
    for counts in ([8, 0, 0, 0], [-1, 0, 0, 0], [1, 1]):
        with pytest.raises(UserError, match="counts must be 4 numbers from 0 to 7"):
            reader.extend(given.params, given.frozen, state, seven, counts)
    _, state = reader.extend(given.params, given.frozen, state, seven, [4, 7, 7, 7])
    assert state.length_B.max() == CAPACITY


def test_a_reader_refuses_what_it_could_not_read() -> None:
    plain, blind, text = case("gpt_learned").model, case("blind_token").model, tower_reads()
    shuffled = dataclasses.replace(blind, shuffled=True)
    separators = dataclasses.replace(text.separators, longest=17)
    long = dataclasses.replace(text, separators=separators)
    for model, capacity, given, why in (
        (plain, 0, None, "at least 1"),
        (plain, 49, None, "learned position table, decoder.max_positions 48"),
        (blind, 8, None, "with its tower only"),
        (dataclasses.replace(blind, tower=None), 8, text, "with its tower only"),
        (shuffled, 8, text, "control=shuffled"),
        (blind, 8, long, "up to 17 tokens, the tower reads 16"),
    ):
        with pytest.raises(UserError, match=why):
            Reader(model, capacity=capacity, text=given)


def test_attention_over_a_cache_refuses_what_it_would_ignore() -> None:
    x = jnp.zeros((1, 2, 1, 2))
    given: dict[str, Any] = {"k_BNSH": x, "v_BNSH": x, "scale": 1.0}
    slots, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 2), bool)
    with pytest.raises(ValueError, match="takes no dropout"):
        Cached(slots, mask, 2).attend(x, x, x, dropout=Dropout(jax.random.key(0), 0.5), **given)
    memory = Memory(x[:, :, None], x[:, :, None])
    with pytest.raises(ValueError, match="beside <eos> no memory"):
        Cached(slots, mask, 2, side=True).attend(x, x, x, memory=memory, **given)
