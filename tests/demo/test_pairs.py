from __future__ import annotations

import json
from zipfile import ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.demo.pairs import Pair, distinct_pairs, is_held_out, prepare_pairs, read_pairs
from tests.demo.gettext_files import compile_catalog


def _kept(english, french):
    return distinct_pairs([(english, french)])


def test_prompt_and_completion_join_to_one_text():
    record = Pair("Open file", "Ouvrir le fichier").as_record()
    assert record == {"prompt": "English: Open file\nFrench:", "completion": " Ouvrir le fichier"}


def test_texts_become_one_line_with_plain_spaces_and_apostrophes():
    assert _kept(" Open\n the  file: ", "Ouvrir\nl\u2019autre fichier\u00a0:") == [
        Pair("Open the file:", "Ouvrir l'autre fichier :")
    ]


@pytest.mark.parametrize(
    ("english", "french"),
    [
        ("Open", "Ouvrir"),  # one word
        ("font-size", "taille de police"),  # one word
        ("Open %(name)s", "Ouvrir %(name)s"),  # one word and a placeholder
        ("%1 / %2 {name} <br>", "%1 sur %2"),  # placeholders only
        ("Open file", ""),  # not translated
        ("Jupyter Notebook", "Jupyter notebook"),  # left as it was
    ],
)
def test_messages_that_teach_nothing_are_dropped(english, french):
    assert _kept(english, french) == []


def test_the_first_translation_of_several_is_taken():
    messages = [("Open file", "Ouvrir le fichier"), ("Close it", "Fermer"), (" Open file ", "Ouvrir un fichier")]
    assert distinct_pairs(messages) == [Pair("Open file", "Ouvrir le fichier"), Pair("Close it", "Fermer")]


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


def _wheel(path, member, messages):
    with ZipFile(path, "w") as archive:
        archive.writestr(member, compile_catalog(messages))
        archive.writestr("django/conf/locale/de/LC_MESSAGES/django.mo", compile_catalog({"not this": "nicht das"}))


@pytest.fixture
def downloads(tmp_path):
    """Wheels with a few hundred messages."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    django = {f"message number {chr(97 + i % 26)}{'i' * (i // 26)}": f"message numéro {i}" for i in range(200)}
    _wheel(folder / "django-5.2-py3-none-any.whl", "django/conf/locale/fr/LC_MESSAGES/django.mo", django)
    _wheel(
        folder / "jupyterlab_language_pack_fr_fr-4.5-py3-none-any.whl",
        "jupyterlab_language_pack_fr_FR/locale/fr_FR/LC_MESSAGES/jupyterlab.mo",
        {"Open file": "Ouvrir le fichier", "message number a": "une autre traduction"},
    )
    return folder


def test_files_hold_every_message_once_and_none_on_both_sides(tmp_path, downloads):
    files = prepare_pairs(tmp_path / "data", downloads)
    train, valid = ([pair.english for pair in read_pairs(path)] for path in (files.train, files.valid))
    assert len(train) + len(valid) == 201 == len({*train, *valid})
    assert 3 <= len(valid) <= 30
    assert json.loads(files.train.read_text().splitlines()[0])["prompt"].startswith("English: ")


def test_files_that_are_there_are_kept(tmp_path, downloads):
    files = prepare_pairs(tmp_path / "data", downloads)
    files.train.write_text("mine")
    assert prepare_pairs(tmp_path / "data", downloads).train.read_text() == "mine"


def test_a_damaged_wheel_is_named(tmp_path, downloads):
    (downloads / "django-5.2-py3-none-any.whl").write_bytes(b"half a download")
    with pytest.raises(ConfigurationError, match=r"django-5\.2.*is damaged.*remove it"):
        prepare_pairs(tmp_path / "data", downloads)
