"""Texts are those of full forward passes, whatever the batch, the block and the stop strings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import shutil
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blindvalm_jax import config, partitioning, terminal
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.data import tokenizers as tokenizers_of
from blindvalm_jax.data.clip_cleaning import clean_words
from blindvalm_jax.data.tokenizers import Tokenizer
from blindvalm_jax.decoding import cached, generation, sampling, shading, tower_text
from blindvalm_jax.decoding import rows as rows_of
from blindvalm_jax.decoding.cached import Reader
from blindvalm_jax.decoding.generation import Generator, Taken, Written
from blindvalm_jax.decoding.record import Record
from blindvalm_jax.decoding.rows import CachedRows, Draw
from blindvalm_jax.decoding.sampling import Sampling
from blindvalm_jax.decoding.streaming import Continuation, text_of
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import retrieval
from blindvalm_jax.grounding.images import on_devices
from blindvalm_jax.models.clip import TextTower
from blindvalm_jax.models.decoder import Decoder, memory_shares
from blindvalm_jax.named_model import NamedModel
from blindvalm_jax.objectives.language_model import Model
from blindvalm_jax.trained import TrainedModel
from tests import small_aligned, small_models, small_text, test_train, tiny_tokenizers

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["The cat sat on the mat. A cat, so: (on) it; the mat!", "the AT&T", ""]
NEW, IMAGES = 12, 30


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> Iterator[None]:
    with small_models.quick_compilation():
        yield


@functools.cache
def made(variant: str, rule: str = "causal") -> TrainedModel:
    """A model of random weights as if it were read from a run."""
    tokenizer = small_text.small_clip()
    size = tokenizer.vocab_size - tokenizer.lm_offset
    tower = dataclasses.replace(
        small_models.TOWER, layers=1, vocab_size=size, start_id=size - 2, end_id=size - 1
    )
    positions = "learned" if variant == "gpt_learned" else "sinusoidal"
    shape = dataclasses.replace(
        small_models.CONFIG, layers=2, positions=positions, max_positions=80
    )
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    frozen: dict[str, Any] = {}
    if variant.startswith("gpt"):
        model = Model(Decoder(shape, small_models.PAPER_FUSION, tokenizer.vocab_size))
    else:
        decoder = Decoder(
            shape,
            small_models.PAPER_FUSION,
            vocab_size=tokenizer.vocab_size,
            fusion_layers=(0,),
            memory_width=tower.projection,
        )
        frozen["tower"] = small_models.tower_params(tower)
        search = None
        if variant == "valm":
            search = on_devices(mesh, count=IMAGES, neighbours=3)
            vectors = np.random.default_rng(4).standard_normal((IMAGES, tower.projection))
            frozen["index"] = retrieval.place_keys(vectors.astype(np.float32), mesh)
        readout: Any = "eos" if variant == "eos" else "token"
        model = Model(decoder, TextTower(tower), readout=readout, search=search)
    settings = config.parse(config.default())
    grounding = dataclasses.replace(settings.grounding, segments=rule)
    return TrainedModel(
        model=model,
        params=small_models.random_params(model.init, seed=3),
        frozen=frozen,
        tokenizer=tokenizer,
        tower_tokenizer=None,
        settings=dataclasses.replace(settings, grounding=grounding),
        step=0,
        mesh=mesh,
        images=None,
    )


@functools.cache
def generator(variant: str, settings: Sampling | None = None, **options: Any) -> Generator:
    return Generator(made(variant), settings=settings, **options)


@functools.cache
def _forward(model: Model) -> Callable[..., jax.Array]:
    @jax.jit
    def run(params: Any, frozen: Any, batch: Any) -> jax.Array:
        z_BTKE = model.features(frozen, batch)
        logits_BTV: Any = model.decoder.apply({"params": params}, batch.tokens_BT, z_BTKE)
        return logits_BTV[0]

    return run


def greedily(trained: TrainedModel, prompt: str, count: int) -> list[int]:
    """The likeliest token that is text or ends it, each from a whole row alone."""
    tokenizer = trained.tokenizer
    row = np.append(tokenizer.eos_id, tokenizer.encode_lm(prompt))
    begin = len(row)
    for _ in range(count):
        batch = trained.batch_of_ids([row], length=80)
        logits = np.array(_forward(trained.model)(trained.params, trained.frozen, batch))
        at = logits[len(row) - 1]
        at[[0, 1, 3]] = -np.inf  # fairseq's specials without </s>
        at[tokenizer.vocab_size - 2 :] = -np.inf  # CLIP's own, and what is only padding
        row = np.append(row, at.argmax())
        if row[-1] == tokenizer.eos_id:
            break
    return row[begin:].tolist()


@pytest.mark.parametrize("variant", ["gpt_learned", "gpt_sinusoidal", "token", "eos", "valm"])
def test_the_likeliest_tokens_are_those_of_whole_rows(variant: str) -> None:
    """Prompts of different lengths in one batch, blocks of 5 so that the last one is cut."""
    found = generator(variant, block=5).generate(PROMPTS, max_new_tokens=NEW)
    for prompt, text in zip(PROMPTS, found.texts, strict=True):
        assert text.tokens == greedily(made(variant), prompt, NEW)
        assert text.ending == (
            "end" if text.tokens[-1] == made(variant).tokenizer.eos_id else "length"
        )
    assert len({tuple(text.tokens) for text in found.texts}) == len(PROMPTS)


WARM = Sampling(temperature=0.8, top_k=60, top_p=0.9, min_p=0.02, repetition_penalty=1.3)


def test_a_text_depends_on_seed_prompt_and_sample_alone() -> None:
    """Not on the batch, the block, the number of samples, or what keeps keys and values."""
    asked = generator("token", WARM, block=5)
    together = asked.generate(PROMPTS, max_new_tokens=NEW, samples=3, seed=5).texts
    texts = {(text.prompt, text.sample): text.tokens for text in together}
    assert len({tuple(tokens) for tokens in texts.values()}) == 9
    whole = generator("token", WARM, cached=False)
    for other in (asked, whole):
        for text in other.generate(PROMPTS[1:2], max_new_tokens=NEW, samples=2, seed=5).texts:
            assert text.tokens == texts[text.prompt, text.sample]
    twice = asked.generate(PROMPTS[:1] * 2, max_new_tokens=NEW, numbers=[2, 0], seed=5).texts
    assert [text.sample for text in twice] == [2, 0]
    for text in twice:
        assert text.tokens == texts[text.prompt, text.sample]
    again = asked.generate(PROMPTS, max_new_tokens=NEW, samples=3, seed=6).texts
    assert [text.tokens for text in again] != [text.tokens for text in together]


def test_rows_are_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all at once; the texts of a part are known before the next part begins."""
    asked = generator("token", WARM, block=5)
    together = asked.generate(PROMPTS, max_new_tokens=NEW, samples=3, seed=5).texts
    events: list[tuple[str, int]] = []

    def on_token(taken: Taken) -> None:
        events.append(("token", taken.row))

    for most, rows_at_once in ((1, 1), (2, 2), (7, 6)):
        monkeypatch.setattr(generation, "_TOGETHER", most)
        events.clear()
        apart = asked.generate(
            PROMPTS,
            max_new_tokens=NEW,
            samples=3,
            seed=5,
            on_token=on_token,
            on_texts=lambda texts: events.extend(("text", text.sample) for text in texts),
        ).texts
        assert apart == together
        first = [kind for kind, _ in events].index("text")
        assert {row for _, row in events[:first]} == set(range(rows_at_once))
        assert [sample for kind, sample in events if kind == "text"] == [0, 1, 2] * 3
        assert {row for kind, row in events if kind == "token"} == set(range(9))


def test_a_stop_string_ends_a_text_in_any_block() -> None:
    asked, alone = generator("token", block=5), generator("token", block=1)
    free = asked.generate(PROMPTS, max_new_tokens=NEW).texts
    stop = free[0].text[5:8]
    expected = free[0].text[: free[0].text.index(stop)]
    for other in (asked, alone):
        stopped, *others = other.generate(PROMPTS, max_new_tokens=NEW, stop=[stop]).texts
        assert (stopped.text, stopped.ending) == (expected, "stop")
        assert stopped.tokens == free[0].tokens[: len(stopped.tokens)]
        for text, before in zip(others, free[1:], strict=True):
            assert text.text == before.text.split(stop)[0]


def tokenizers() -> list[Tokenizer]:
    return [small_text.small_bpe(), small_text.small_clip()]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_each_token_gives_what_decoding_the_whole_text_does(kind: int, seed: int) -> None:
    """Text, ending and what is released; random tokens, so also bytes that are no characters."""
    rng, tokenizer = np.random.default_rng(seed), tokenizers()[kind]

    def form(text: str) -> str:
        """CLIP's stop strings are sought without case and white space."""
        return "".join(text.lower().split()) if kind else text

    for trial in range(48):
        prompt = tokenizer.encode_lm(["漢字 The cat 🙂 sat", "", "é"][trial % 3])
        if trial % 4 == 0:
            prompt = prompt[:-1]  # may end inside a character
        texts = " ".join(small_text.documents(1, seed=seed + 9 * trial, longest=6)) + " 🙂漢 naïve"
        words, drawn = tokenizer.encode_lm(texts), rng.integers(0, tokenizer.vocab_size, 25)
        tokens = rng.permuted(drawn) if trial % 2 else np.append(words, drawn)
        tokens = tokens[tokens != tokenizer.eos_id].tolist()
        most = len(tokens) - trial % 2
        if trial % 3 == 0:
            tokens.insert(-3, tokenizer.eos_id)
        front = text_of(tokenizer, prompt)
        whole = text_of(tokenizer, [*prompt, *tokens])[len(front) :]
        at = sorted(rng.integers(0, len(whole), 2))
        stop = [whole[at[0] : at[0] + int(rng.integers(1, 6))], whole[at[1] : at[1] + 3], "none"]
        stop = [text for text in stop if form(text) and not text.endswith("\ufffd")]
        stop = [] if trial % 4 == 3 else stop
        cleaned = ["".join(clean_words(text)) for text in stop if kind]
        forms = [form(text) for text in [*stop, *cleaned] if form(text)]
        found, released = Continuation(tokenizer, prompt, stop=stop, most=most), ""
        for count, token in enumerate(tokens, start=1):
            found.add(token)
            released += found.release()
            text = text_of(tokenizer, [*prompt, *tokens[:count]])[len(front) :]
            ending = "end" if token == tokenizer.eos_id else "length" if count == most else ""
            text = text if ending else text.rstrip("\ufffd")
            ends = [n for n in range(len(text) + 1) if form(text[:n]).endswith(tuple(forms))]
            if forms and ends:
                shown, ending = text[: ends[0]], "stop"
                begins = [n for n in range(len(shown)) if form(shown[n:]) in forms]
                longest = max(len(form(shown[n:])) for n in begins)
                text = shown[: max(n for n in begins if len(form(shown[n:])) == longest)]
            assert (found.text, found.ending, found.tokens) == (text, ending, tokens[:count])
            behind = [form(text[n:]) for n in range(len(text))]
            sizes = [
                len(end) for end in behind if any(end and one.startswith(end) for one in forms)
            ]
            if ending:
                assert released == text
                break
            last = max(
                (n for n, end in enumerate(behind) if sizes and len(end) == max(sizes)),
                default=len(text),
            )
            assert released == text[:last]
        assert found.ending


def test_a_token_is_decoded_with_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text has grown; with a stop string that is sought in all of it."""
    for tokenizer in tokenizers():
        ids = tokenizer.encode_lm(" ".join(small_text.documents(3, seed=1)))
        sizes: list[int] = []
        decode = tokenizer.decode

        def counted(given: Sequence[int], sizes: list[int] = sizes, decode: Any = decode) -> Any:
            sizes.append(len(given))
            return decode(given)

        monkeypatch.setattr(tokenizer, "decode", counted)
        found = Continuation(tokenizer, ids[:5], stop=["zzzz"], most=len(ids))
        for token in ids[5:].tolist():
            found.add(token)
        assert len(found.tokens) > 300
        assert max(sizes) < 10


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        ("Q:", "a cat. Q: what", " a cat . "),
        ("don't", "we don't", " we "),
        ("don\u2019t", "we don't", " we "),
        ("The Mat\n", "on the mat", " on "),
    ],
)
def test_stop_strings_are_sought_as_clip_writes(stop: str, text: str, expected: str) -> None:
    """In lower case, with blanks between pieces; nothing of a stop string is shown before."""
    tokenizer = small_text.small_clip()
    front = tokenizer.encode_lm("The cat")
    found = Continuation(tokenizer, front, stop=[stop], most=99)
    shown = ""
    for token in tokenizer.encode_lm(text).tolist():
        found.add(token)
        shown += found.release()
    assert (shown, found.text, found.ending) == (expected, expected, "stop")


def test_ids_that_are_no_text_are_left_out() -> None:
    """Those below the language model's offset, and the end of a text, in front and between."""
    tokenizer = small_text.small_clip()
    ids = tokenizer.encode_lm("the cat")
    mixed = np.concatenate([[2, 0], ids[:1], [2], ids[1:]]).astype(np.int32)
    found = Continuation(tokenizer, mixed, stop=[], most=9)
    for token in tokenizer.encode_lm("sat").tolist():
        found.add(token)
    assert found.text == " sat"
    asked = generator("token", block=5)
    texts = asked.generate([mixed, mixed[2:]], max_new_tokens=3).texts
    assert [text.prompt for text in texts] == ["the cat", "the cat"]


def test_half_a_character_waits_for_the_other_half() -> None:
    tokenizer = small_text.small_bpe()
    ids = tokenizer.encode_lm("x🙂y")
    found = Continuation(tokenizer, ids[:0], stop=[], most=99)
    shown = []
    for token in ids.tolist():
        found.add(token)
        shown.append(found.release())
    assert len(ids) > 3
    assert [text for text in shown if text] == ["x", "🙂", "y"]
    found.add(tokenizer.eos_id)
    assert (found.text, found.ending, found.tokens[-1]) == ("x🙂y", "end", tokenizer.eos_id)
    cut = Continuation(tokenizer, ids[:0], stop=[], most=2)
    for token in ids.tolist():
        cut.add(token)
    assert (cut.text, cut.ending, len(cut.tokens)) == ("x\ufffd", "length", 2)


def taken_of(
    tokenizer: Tokenizer, ids: np.ndarray, shares: np.ndarray, *, stop: Sequence[str] = ()
) -> tuple[list[Taken], Continuation]:
    """What a display is given of a text, and the text."""
    found, taken = Continuation(tokenizer, ids[:0], stop=stop, most=99), []
    for token, share in zip(ids.tolist(), shares, strict=True):
        found.add(token)
        taken.append(Taken(0, token, found.release(), share))
    return taken, found


@pytest.mark.parametrize("shades", [False, True])
@pytest.mark.parametrize("stop", [[], ["y"], ["yz"]])
def test_every_share_is_shown(
    shades: bool, stop: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens that are half a character, of the end of the text, and of a stop string."""
    tokenizer = small_text.small_bpe()
    ids = np.array([*tokenizer.encode_lm("x🙂y"), tokenizer.eos_id])
    ids = ids[: len(ids) - (stop == ["y"])]
    if stop == ["yz"]:
        ids[-1:] = tokenizer.encode_lm("z")
    shares = np.random.default_rng(0).random((len(ids), 2))
    taken, text = taken_of(tokenizer, ids, shares, stop=stop)
    assert text.text == ("x🙂" if stop else "x🙂y")
    if not shades:
        table = shading.Table(tokenizer, [3, 5])
        assert table.head().split() == ["token", "layer", "3", "layer", "5"]
        lines = [table.line(one).split() for one in taken]
        own = [repr(text_of(tokenizer, [token])) for token in ids]
        own[-1] = own[-1] if stop else "(end)"
        assert [line[0] for line in lines] == own
        assert [line[1:] for line in lines] == [[f"{x:.4f}" for x in share] for share in shares]
        return
    shown: list[tuple[str, float]] = []

    def shaded(text: str, share: float) -> str:
        shown.append((text, share))
        return text

    monkeypatch.setattr(shading, "shaded", shaded)
    display = shading.Shades(tokenizer)
    assert "".join(map(display.add, taken)) == text.text
    rest = display.rest(text.ending)
    at, each = len(ids) - 1 - (stop != ["y"]), shares.mean(axis=1)
    behind = [] if stop else [("y", each[at])]
    behind += [(rest, each[at if stop else at + 1 :].mean())]
    assert rest == ("(stop)" if stop else "(end)")
    assert [text for text, _ in shown] == ["x", "🙂", *(text for text, _ in behind)]
    expected = [each[0], each[1:at].mean(), *(share for _, share in behind)]
    np.testing.assert_allclose([share for _, share in shown], expected, rtol=1e-12)


def test_a_text_released_in_two_pieces_has_its_share_twice() -> None:
    """Its second half was held back, as the beginning of a stop string, until the text ended."""
    tokenizer, share = small_text.small_bpe(), np.full(1, 0.7)
    display = shading.Shades(tokenizer)
    first = display.add(Taken(0, 5, "wha", share))
    second = display.add(Taken(0, tokenizer.eos_id, "t", np.full(1, 0.3)))
    assert [first, second] == [shading.shaded(text, 0.7) for text in ("wha", "t")]
    assert display.rest("end") == shading.shaded("(end)", 0.3)


def test_a_record_holds_what_is_done_whatever_comes(tmp_path: Path) -> None:
    """After each part; a file of before is left where nothing was done."""
    out = tmp_path / "texts.json"
    texts = [
        Written(prompt="a", sample=n, text="b", tokens=[5], ending="length", shares=None)
        for n in range(3)
    ]

    def held() -> tuple[bool, list[int]]:
        found = json.loads(out.read_text())
        assert found["seed"] == 1
        return found["finished"], [text["sample"] for text in found["texts"]]

    with Record(out, {"seed": 1}) as record:
        record.add(texts)
    assert held() == (True, [0, 1, 2])
    with pytest.raises(KeyboardInterrupt), Record(out, {}):
        raise KeyboardInterrupt
    assert held() == (True, [0, 1, 2])

    def interrupted() -> None:
        with Record(out, {"seed": 1}) as record:
            record.add(texts[:1])
            assert held() == (False, [0])
            record.add(texts[1:])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert held() == (False, [0, 1, 2])


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_line_is_a_prompt_without_its_end(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line feeds of other systems are no part of a prompt either."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the cat{ends}{ends}a dog", newline=""))
    prompts: list[str] = []
    terminal.each_line(lambda line, check: prompts.append(line))
    assert prompts == ["the cat", "", "a dog"]


class _TornDown:
    """Ctrl-C is pressed while this goes, where what is raised is lost."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_not_lost_where_an_object_is_torn_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the line it is pressed on; pressed behind a line's end, all of it; twice, at once."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n3\n4\n"))
    seen: list[str] = []

    def go_on(line: str, check: Callable[[], None]) -> None:
        seen.append(line)
        if line == "2":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        _TornDown()
        if line == "1":
            check()
        seen.append("done")

    before = signal.getsignal(signal.SIGINT)
    terminal.each_line(go_on)
    assert seen == ["1", "2", "3", "done"]
    assert capsys.readouterr().out == "\n" * 3
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_no_text_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"a \xff b\n"), encoding="utf-8", errors="strict")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(sys, "stdout", shown)
    terminal.take_any_text()
    line = sys.stdin.readline()
    print(line, "naïve")
    shown.flush()
    assert line == "a \ufffd b\n"
    assert shown.buffer.getvalue() == b"a \\ufffd b\n na\\xefve\n"
    assert terminal.argument(os.fsdecode(b"a \xff\xe9 b")) == "a \ufffd\ufffd b"
    assert terminal.argument("naïve 漢字 🙂") == "naïve 漢字 🙂"


RULES = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=5),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=0.9, min_p=0.2),
    Sampling(repetition_penalty=1.7),
    Sampling(temperature=1.3, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
]


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, V] and ids [B, T] that the rows hold."""
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((4, 50)).astype(np.float32), rng.integers(0, 50, (4, 9))


def seen_in(ids: np.ndarray, size: int) -> jax.Array:
    return jnp.asarray(np.stack([np.isin(np.arange(size), row) for row in ids]))


def ours(rule: Sampling) -> np.ndarray:
    """Probabilities [B, V] of the tokens; tokens 3 and 47 are no text, 48 and 49 only padding."""
    logits, ids = rows()
    never = np.isin(np.arange(48), [3, 47])
    found = jax.jit(functools.partial(sampling.scores, sampling=rule, never_V=never))(
        logits, seen_BV=seen_in(ids, 50)
    )
    assert np.all(np.isneginf(found[:, [3, 47, 48, 49]]))
    return np.asarray(jax.nn.softmax(found))


EXTREME = [
    Sampling(temperature=1e-40),
    Sampling(temperature=1e-300, top_p=0.5),
    Sampling(temperature=1e300),
    Sampling(temperature=1.0, repetition_penalty=1e300),
    Sampling(repetition_penalty=1e-300),
]


@pytest.mark.parametrize("rule", EXTREME, ids=str)
def test_extreme_settings_give_probabilities(rule: Sampling) -> None:
    """Of the limit: the likeliest token, all alike, no seen token, only seen ones."""
    logits, ids = rows()
    found = ours(rule)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-5)
    text = np.delete(np.arange(50), [3, 47, 48, 49])
    for at, own, p in zip(logits, ids, found, strict=True):
        if 0 < rule.temperature < 1:
            assert p[text[at[text].argmax()]] == 1
        elif rule.temperature > 1:
            np.testing.assert_allclose(p[text], 1 / len(text), rtol=0, atol=1e-6)
        elif rule.temperature:
            assert p[[n for n in own if at[n] < 0]].max() == 0
        else:
            assert p.argmax() in own


@pytest.mark.torch
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_are_those_of_transformers(rule: Sampling) -> None:
    """Its processors in its order; 1e-6 for fp32 probabilities."""
    import torch
    import transformers

    logits, ids = rows()
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=4, n_layer=1, n_head=1)
    )
    options = transformers.GenerationConfig(
        do_sample=rule.temperature > 0,
        temperature=rule.temperature or 1.0,
        top_k=rule.top_k,
        top_p=rule.top_p,
        min_p=rule.min_p or None,
        repetition_penalty=rule.repetition_penalty,
        suppress_tokens=[3, 47, 48, 49],
    )
    processors = model._get_logits_processor(
        options, input_ids_seq_length=ids.shape[1], device="cpu", model_kwargs={}
    )
    expected = processors(torch.from_numpy(ids), torch.from_numpy(logits)).softmax(-1).numpy()
    np.testing.assert_allclose(ours(rule), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_probabilities_are_those_of_the_definitions(rule: Sampling) -> None:
    """Row by row from the papers' words; 1e-6 for fp32 probabilities."""
    logits, ids = rows()
    for row, found in enumerate(ours(rule)):
        at = logits[row].astype(np.float64)
        for token in set(ids[row].tolist()):
            at[token] *= 1 / rule.repetition_penalty if at[token] > 0 else rule.repetition_penalty
        at[[3, 47, 48, 49]] = -np.inf
        order = np.argsort(-at)
        p = np.exp((at - at.max()) / (rule.temperature or 1))
        keep = np.isfinite(at)
        if rule.top_k:
            keep[order[rule.top_k :]] = False
        p = p * keep / (p * keep).sum()
        keep[order[1:][np.cumsum(p[order])[:-1] >= rule.top_p]] = False
        p = p * keep / (p * keep).sum()
        keep[p < rule.min_p * p.max()] = False
        p = p * keep / (p * keep).sum()
        np.testing.assert_allclose(found, p, rtol=0, atol=1e-6)


def test_draws_have_the_probabilities_of_the_scores() -> None:
    """20,000 draws of 4 tokens: within 5 standard deviations. Temperature 0 takes the largest."""
    p = np.array([0.5, 0.3, 0.2, 0.0])
    scores = jnp.broadcast_to(jnp.log(p), (20_000, 4))
    keys = jax.random.split(jax.random.key(1), len(scores))
    drawn = sampling.draw(scores, keys, sampling=Sampling(temperature=1.0))
    shares = np.bincount(drawn, minlength=4) / len(scores)
    assert np.all(np.abs(shares - p) <= 5 * np.sqrt(p * (1 - p) / len(scores)))
    assert np.all(np.asarray(sampling.draw(scores, keys, sampling=Sampling())) == 0)


def test_what_is_never_text() -> None:
    bpe, clip = tokenizers()
    assert not sampling.never_text(bpe).any()  # its pad is the end of a text
    never = np.flatnonzero(sampling.never_text(clip))
    assert never.tolist() == [0, 1, 3, clip.vocab_size - 2, clip.vocab_size - 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .* got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be more than 0"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"top_k": 3}, "top_k has no effect at temperature 0"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def by_hand(trained: TrainedModel, tokens: np.ndarray, z: np.ndarray) -> tuple[Any, Any]:
    """Weights on memory and text [B, T, N] of fusion block 0, from its parameters in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), trained.params)
    block = params["h"]["fusion_0"]
    embedded: Any = jax.jit(functools.partial(trained.model.decoder.apply, method="embed"))(
        {"params": trained.params}, jnp.asarray(tokens)
    )
    x = np.asarray(embedded, np.float64)

    def norm(x: np.ndarray, at: dict[str, np.ndarray]) -> np.ndarray:
        spread = np.sqrt(x.var(-1, keepdims=True) + trained.model.decoder.config.norm_epsilon)
        return (x - x.mean(-1, keepdims=True)) / spread * at["scale"] + at["bias"]

    own, memory = block["attn"]["qkv"], block["attn"]["memory"]
    h = norm(x, block["ln_1"])
    q, k = (np.einsum("btd,dnh->btnh", h, own["kernel"][:, c]) + own["bias"][c] for c in (0, 1))
    z = z.astype(np.float64) @ memory["adapter"]["kernel"] + memory["adapter"]["bias"]
    k_z = np.einsum("btkd,dnh->btknh", norm(z, memory["norm"]), own["kernel"][:, 1])
    k_z += memory["kv_bias"][0]
    root = np.sqrt(trained.model.decoder.config.width)
    text = np.exp(np.einsum("btnh,bsnh->btns", q, k) / root)
    text *= np.tril(np.ones((tokens.shape[1],) * 2))[None, :, None]
    grounding = np.exp(np.einsum("btnh,btknh->btnk", q, k_z) / root)
    total = text.sum(-1) + grounding.sum(-1)
    return grounding.sum(-1) / total, text.sum(-1) / total


@functools.cache
def _probed(model: Model) -> Callable[..., Any]:
    @jax.jit
    def run(params: Any, frozen: Any, batch: Any) -> Any:
        z_BTKE = model.features(frozen, batch)
        _, kept = model.decoder.apply(
            {"params": params}, batch.tokens_BT, z_BTKE, method="hidden", mutable=["probes"]
        )
        return z_BTKE, memory_shares(kept["probes"])

    return run


@pytest.mark.parametrize("variant", ["token", "valm"])
def test_the_probe_is_the_weight_on_the_grounding(variant: str) -> None:
    """By whole rows, and in pieces; 1e-5 for fp32."""
    trained = made(variant)
    batch = trained.batch(PROMPTS[:2])
    tokens = np.asarray(batch.tokens_BT)
    counts = 1 + np.asarray(batch.weights_BT).sum(1).astype(np.int32)
    z, shares = _probed(trained.model)(trained.params, trained.frozen, batch)
    expected, text = by_hand(trained, tokens, np.asarray(z))
    assert shares.shape == (1, *expected.shape)
    np.testing.assert_allclose(shares[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(shares[0] + text, 1, rtol=0, atol=1e-5)
    reader = cached.reader(trained, capacity=tokens.shape[1])
    state = reader.start(trained.frozen, rows=2)
    run = jax.jit(reader.probed_step)
    _, _, pieces = run(trained.params, trained.frozen, state, tokens, counts)
    for row, count in enumerate(counts):
        np.testing.assert_allclose(pieces[0, row, :count], expected[row, :count], rtol=0, atol=1e-5)


def test_shares_of_a_text_are_those_where_its_tokens_were_predicted() -> None:
    """From caches and, with another length of the row, from whole rows; 1e-5 for fp32."""
    trained = made("token")
    for cached_rows in (True, False):
        asked = generator("token", probe=True, block=5, cached=cached_rows)
        text = asked.generate(PROMPTS[1:2], max_new_tokens=NEW).texts[0]
        row = np.append(trained.tokenizer.eos_id, trained.tokenizer.encode_lm(text.prompt))
        batch = trained.batch_of_ids([np.append(row, text.tokens[:-1])])
        _, expected = _probed(trained.model)(trained.params, trained.frozen, batch)
        assert text.shares is not None
        np.testing.assert_allclose(
            text.shares, expected[:, 0, len(row) - 1 :].mean(-1), rtol=0, atol=1e-5
        )


@pytest.fixture
def capacities(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those of the readers that are made."""
    made, found = cached.reader, list[int]()

    def counted(trained: TrainedModel, *, capacity: int) -> Reader:
        found.append(capacity)
        return made(trained, capacity=capacity)

    monkeypatch.setattr(cached, "reader", counted)
    return found


def test_caches_grow_with_what_is_read(
    monkeypatch: pytest.MonkeyPatch, capacities: list[int]
) -> None:
    """Doubled twice, and not above what was asked for; the tokens are those of whole rows."""
    monkeypatch.setattr(rows_of, "_STEP", 4)
    monkeypatch.setattr(rows_of, "_ROOM", 4)
    text = Generator(made("gpt_sinusoidal"), block=5).generate([""], max_new_tokens=19).texts[0]
    assert len(text.tokens) == 19
    assert text.tokens == greedily(made("gpt_sinusoidal"), "", 19)
    assert capacities == [8, 16, 20]


def test_a_million_tokens_that_nobody_reads_cost_nothing(capacities: list[int]) -> None:
    draw = Draw(Sampling(), np.zeros(1, bool), made("gpt_sinusoidal").tokenizer.eos_id, 0)
    asked = CachedRows(made("gpt_sinusoidal"), draw, block=5)
    asked.begin([np.full(60, 5, np.int32)], 1, jax.random.split(jax.random.key(0), 1), 10**6)
    asked.go_on(np.zeros(1, bool))
    assert capacities == [320]


def test_nothing_is_computed_for_a_probe_that_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The traced gradients are those of a model that has no probe."""
    model, batch = small_models.blind_model(), small_models.blind_batch()
    params = small_models.random_params(model.init, seed=0)
    frozen = {"tower": small_models.tower_params()}

    def traced() -> str:
        run = functools.partial(model.gradients, frozen=frozen, batch=batch, key=jax.random.key(0))
        return str(jax.make_jaxpr(run)(params))

    here = traced()
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **options: False)
    assert here == traced()


def test_the_reference_rule_reads_whole_rows() -> None:
    trained = made("token", "reference")
    assert "segments=reference" in tower_text.whole_only(trained)
    found = Generator(trained).generate(PROMPTS[:2], max_new_tokens=4).texts
    for prompt, text in zip(PROMPTS, found, strict=False):
        assert text.tokens == greedily(trained, prompt, 4)


def test_a_tower_that_reads_text_reads_whole_rows(tmp_path: Path) -> None:
    """Each token is the likeliest behind the text so far, in whatever tokens it was written."""
    named = NamedModel(**small_aligned.write(tmp_path))
    trained = named.load(mesh=partitioning.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert "tokenizer of its own" in tower_text.whole_only(trained)
    warm = Sampling(temperature=2.0)
    drawn = Generator(trained, settings=warm).generate(["the ring"], max_new_tokens=NEW).texts[0]
    ids = trained.tokenizer.encode_lm(drawn.prompt + drawn.text)
    assert ids[-len(drawn.tokens) :].tolist() != drawn.tokens  # other tokens spell it as well
    prompts = [drawn.prompt + drawn.text, "café", ""]
    rows = [trained.tokenizer.encode_lm("the ring").tolist() + drawn.tokens]
    found = Generator(trained).generate(
        [np.array(rows[0]), *prompts[1:]], max_new_tokens=4, samples=1
    )
    starts = [rows[0], *(trained.tokenizer.encode_lm(prompt).tolist() for prompt in prompts[1:])]
    for start, text in zip(starts, found.texts, strict=True):
        row = [trained.tokenizer.eos_id, *start]
        for token in text.tokens:
            batch = trained.batch_of_ids([np.array(row, np.int32)], length=80)
            logits = np.array(_forward(trained.model)(trained.params, trained.frozen, batch))
            assert logits[len(row) - 1, : trained.tokenizer.vocab_size].argmax() == token
            row.append(token)


def test_what_cannot_write_is_refused() -> None:
    trained = made("token")
    shuffled = dataclasses.replace(trained.model, shuffled=True)
    asked = generator("gpt_learned", block=5)
    draw = Draw(Sampling(), np.zeros(1, bool), trained.tokenizer.eos_id, 0)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Generator(dataclasses.replace(trained, model=shuffled)), "control=shuffled"),
        (lambda: Generator(made("gpt_learned"), probe=True), "no fusion layers"),
        (lambda: asked.generate(["the"], max_new_tokens=80), "2 tokens and 80 new ones .* most 79"),
        (lambda: asked.generate(["the"], max_new_tokens=0), "max_new_tokens must be 1 or more"),
        (lambda: asked.generate(["the"], max_new_tokens=10**7), "at most 1000000, got 10000000"),
        (
            lambda: asked.generate(["the", "a" * 99], max_new_tokens=1),
            "prompt 2 of 100 tokens and 1 new ones .*: shorten the prompt$",
        ),
        (
            lambda: asked.generate(["the"], max_new_tokens=1, samples=2),
            "2 samples at temperature 0 would be the same",
        ),
        (lambda: asked.generate("the", max_new_tokens=1), "prompts must be a list"),
        (lambda: asked.generate(["the"], max_new_tokens=1, stop="x"), "stop must be a list"),
        (lambda: asked.generate(["the"], max_new_tokens=1, stop=[" \n"]), "is white space alone"),
        (lambda: asked.generate([np.ones(3)], max_new_tokens=1), r"prompt 1 is float64 \[3\]"),
        (lambda: asked.generate([np.ones((1, 3), int)], max_new_tokens=1), r"is int64 \[1, 3\]"),
        (lambda: asked.generate([np.array([5, 10**6])], max_new_tokens=1), "the id 1000000, the"),
        (
            lambda: CachedRows(made("gpt_learned"), draw, block=1).begin(
                [np.full(60, 5, np.int32)], 1, jax.random.split(jax.random.key(0), 1), 22
            ),
            "a capacity of 81 tokens exceeds the learned position table, .* 80",
        ),
        (lambda: asked.generate(["the"], max_new_tokens=1, stop=["x", ""]), "string is empty"),
        (lambda: asked.generate([], max_new_tokens=1), "there is no prompt"),
        (
            lambda: generator("token", start=False).generate([""], max_new_tokens=1),
            "prompt 1 is empty",
        ),
    ]
    for run, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIND-VALM after two updates."""
    directory = tmp_path_factory.mktemp("generate")
    small_text.write_text(directory / "text.txt", small_text.documents(60))
    changes = {"train__steps": 2, "eval__every_steps": 0, "data__workers": 1}
    values = test_train.settings(directory / "text.txt", **changes)
    test_train.run(values, directory / "run")
    return directory / "run"


def command(
    run: Path, *arguments: str, given: str = "", by: str = "workdir", **env: str
) -> subprocess.CompletedProcess[str]:
    line = ("-m", "blindvalm_jax.generate", f"--{by}={run}", *arguments)
    return python(*line, given=given, **env)


def python(*arguments: str, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if "OPTIMIZED_TESTS" in os.environ else "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        input=given,
        env={**os.environ, **quickly, **env},
    )


def test_the_command_prints_and_writes_the_texts(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The cat\n\nnaïve\x85 漢字\n")
    out = tmp_path / "texts.json"
    sampled = (
        "--temperature=0.9",
        "--top_p=0.9",
        "--samples=2",
        "--max_new_tokens=5",
        "--stop=zzzz",
    )
    done = command(finished, f"--prompts={tmp_path / 'prompts.txt'}", f"--json={out}", *sampled)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    found = json.loads(out.read_text())
    assert [text["prompt"] for text in found["texts"]] == ["The cat"] * 2 + ["naïve\x85 漢字"] * 2
    assert (found["temperature"], found["step"], found["seed"]) == (0.9, 2, 0)
    assert (found["samples"], found["stop"], found["start"]) == (2, ["zzzz"], True)
    assert (found["dtype"], found["finished"]) == ("float32", True)
    for number, text in enumerate(found["texts"]):
        head = f"=== prompt {number // 2 + 1}, sample {number % 2 + 1}\n"
        assert head + text["prompt"] + text["text"] + "\n" in done.stdout
        assert 1 <= len(text["tokens"]) <= 5


def test_the_command_streams_and_shows_the_grounding(finished: Path) -> None:
    """A zero byte is written each time that the model is asked for another token."""
    program = (
        "import os; from blindvalm_jax import generate; from blindvalm_jax.decoding import rows\n"
        "go_on = rows.CachedRows.go_on\n"
        "rows.CachedRows.go_on = lambda *given: os.write(1, b'\\0') and go_on(*given)\n"
        "generate.run_main(generate.main)"
    )
    asked = (f"--workdir={finished}", "--prompt=The cat", "--max_new_tokens=6", "--stream")
    streamed = python("-c", program, *asked)
    assert streamed.returncode == 0, streamed.stderr
    pieces = streamed.stdout.split("\0")
    assert len(pieces) == 6
    assert pieces[0].startswith("The cat")
    assert sum(bool(piece.strip()) for piece in pieces[1:]) >= 3
    shown = command(finished, "--interactive", "--max_new_tokens=6", given="The mat\nThe cat\n")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["token", "layer", "0"]
    assert all(0 < float(line.split()[-1]) < 1 for line in lines[1:7])
    assert shown.stdout.endswith("".join(pieces))


def test_ctrl_c_ends_a_text_and_at_the_prompt_the_command(finished: Path) -> None:
    """The first text would take minutes; the second, of another line, is shown behind it."""
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('blindvalm_jax.generate', run_name='__main__', alter_sys=True)"
    )
    asked = [f"--workdir={finished}", "--interactive", "--max_new_tokens=4000", "--seed=3"]
    line = [sys.executable, "-u", "-c", program, *asked, "--temperature=1"]
    with subprocess.Popen(
        line,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for prompt in ("The cat\n", "a mat\n"):
            process.stdin.write(prompt)
            process.stdin.flush()
            assert process.stdout.readline().split() == ["token", "layer", "0"]
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            while process.stdout.readline() != "\n":
                assert process.poll() is None
        # Python notices a signal between two of its instructions, not one that comes right before
        # it begins to wait for a line: who presses again is heard.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGINT)
            process.wait(10)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout.read() == "\n"
        assert "Traceback" not in process.stderr.read()


def test_the_reference_rule_is_said(finished: Path, tmp_path: Path) -> None:
    """On standard error; a stop string ends the text, and no byte of a prompt the command."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    values = json.loads((run / "config.json").read_text())
    values["grounding"]["segments"] = "reference"
    (run / "config.json").write_text(json.dumps(values))
    prompt = os.fsdecode(b"--prompt=The cat \xff")
    stops = (f"--stop={letter}" for letter in string.printable)
    out = tmp_path / "text.json"
    asked = (prompt, *stops, "--temperature=2", f"--json={out}")
    done = command(run, *asked, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: under grounding.segments=reference")
    text = json.loads(out.read_text())["texts"][0]
    assert (text["prompt"], text["ending"]) == ("The cat \ufffd", "stop")
    assert not set(string.printable) & set(text["text"])
    shown = text["prompt"] + text["text"] + "\n"
    assert done.stdout == shown.encode("ascii", "backslashreplace").decode()


@pytest.mark.torch
def test_the_command_goes_on_with_a_gpt2_of_others(tmp_path: Path) -> None:
    """Its text is that of transformers' greedy search, up to the stop string; nothing to show."""
    import torch
    import transformers

    vocabulary, merges = tiny_tokenizers.gpt2_parts()
    tiny_tokenizers.write_pair(tmp_path, vocabulary, merges)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        initializer_range=0.3,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer = tokenizers_of.load("gpt2", str(tmp_path))
    front = [tokenizer.eos_id, *tokenizer.encode("the cat")]
    ids = theirs.generate(
        torch.tensor([front]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(ids[0, 1:].tolist())
    stop = text[-2:]
    done = command(
        tmp_path, f"--stop={stop}", "--prompt=the cat", f"--max_new_tokens={NEW}", by="hf"
    )
    assert done.returncode == 0, done.stderr
    before = len("the cat")
    assert done.stdout == text[: text.index(stop, before)] + "\n"
    shown = command(tmp_path, "--interactive", "--max_new_tokens=1", given="the cat\n", by="hf")
    assert "note: this model has no fusion layers" in shown.stderr
    assert shown.stdout.startswith("the cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --prompt=TEXT, --prompts=FILE or --interactive, got none"),
        (["--prompt=a", "--interactive"], "got --prompt and --interactive"),
        (["--prompt=a", "--prompt=b", "--stream"], "--stream prints one text"),
        (["--prompt=a", "--temperature=-1"], "temperature must be 0"),
        (["--prompt=a", "--json=no/file"], "must be a file in a directory that is there"),
        (["--prompt=a", "--json=/proc/texts.json"], "--json=/proc/texts.json cannot be written"),
        (["--prompt=a", "--samples=2"], "2 samples at temperature 0 would be the same text"),
        (["--prompt=a", "--max_new_tokens=2000000"], "at most 1000000, got 2000000"),
        (["--interactive", "--stream"], "leave out --stream"),
        (["--interactive", "--stop="], "a stop string is empty"),
    ],
)
def test_wrong_commands_are_one_line(
    arguments: Sequence[str], message: str, tmp_path: Path
) -> None:
    done = command(tmp_path / "none", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_goes_away_is_no_error(lines: int, unbuffered: str) -> None:
    program = (
        "from blindvalm_jax.command_line import run_main\n"
        f"run_main(lambda argv: [print('x' * 99) for _ in range({lines})] and 0)"
    )
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        (">&-", 0, ""),
        (">/dev/full", 1, "error: where standard output or a file goes: No space left on device"),
    ],
)
def test_standard_output_that_is_closed_or_full(shell: str, code: int, told: str) -> None:
    program = "from blindvalm_jax.command_line import run_main; run_main(lambda argv: print('x'))"
    line = f'exec "{sys.executable}" -c "{program}" {shell}'
    done = subprocess.run(line, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.partition(";")[0].strip()) == (code, told)
    assert done.stderr.count("\n") == code


def test_a_disk_that_is_full_elsewhere_takes_no_output_with_it() -> None:
    program = (
        "from blindvalm_jax.command_line import run_main\n"
        "def main(argv):\n"
        "    print('said')\n"
        "    with open('/dev/full', 'w') as full:\n"
        "        full.write('x')\n"
        "run_main(main)"
    )
    line, buffered = [sys.executable, "-c", program], {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=buffered)
    assert (done.returncode, done.stdout) == (1, "said\n")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_broken_pipe_is_an_error() -> None:
    program = (
        "import os; from blindvalm_jax.command_line import run_main; reads, writes = os.pipe()\n"
        "run_main(lambda argv: os.close(reads) or os.write(writes, b'x') and 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_the_benchmark_has_so_many_positions() -> None:
    asked = ("--prompt_tokens=1000", "--new_tokens=26")
    line = [sys.executable, "-m", "benchmarks.run", "generate", *asked]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "exceed the decoder's 1024 positions" in done.stderr


@pytest.mark.slow
def test_the_benchmark_measures_every_system(tmp_path: Path) -> None:
    """Those of one model choose the same tokens, at the lengths of full rows that are compared."""
    out = tmp_path / "numbers.json"
    shape = ("--decoder=2,32,2", "--tower=1,16,2", "--prompt_tokens=5", "--new_tokens=9")
    line = [sys.executable, "-m", "benchmarks.run", "generate", *shape, "--batches=2", "--rounds=1"]
    done = subprocess.run([*line, f"--json={out}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["batches"][0]
    theirs = ["transformers"] if importlib.util.find_spec("torch") else []
    assert [*found["systems"]] == ["gpt2", "whole", *theirs, "token", "eos"]
    assert found["same_tokens"] == dict.fromkeys(["whole", *theirs], True)
    assert found["different_tokens"] > 4
    assert found["systems"]["gpt2"]["ratio"] == 1
