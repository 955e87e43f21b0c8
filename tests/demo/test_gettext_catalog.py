from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.demo.gettext_catalog import read_messages
from tests.demo.gettext_files import compile_catalog


@pytest.mark.parametrize("order", ["<", ">"])
def test_contexts_are_dropped_and_plurals_are_pairs_of_their_own(order):
    catalog = compile_catalog(
        {
            "": "Language: fr\n",
            "Open file": "Ouvrir le fichier",
            "menu\x04Save all": "Tout enregistrer",
            "context\x04%d row\0%d rows": "%d ligne\0%d de lignes\0%d lignes",
        },
        order,
    )
    assert list(read_messages(catalog)) == [
        ("Open file", "Ouvrir le fichier"),
        ("Save all", "Tout enregistrer"),
        ("%d row", "%d ligne"),
        ("%d rows", "%d lignes"),
    ]


WHOLE = compile_catalog({"a b": "c d"})


@pytest.mark.parametrize("broken", [b"", b"not a catalog, but long enough", WHOLE[:-3], bytes(28)])
def test_what_is_not_a_catalog_is_refused(broken):
    with pytest.raises(ConfigurationError, match="not a compiled gettext catalog"):
        list(read_messages(broken))
