"""Templates from outside: what transformers and the harness would write, and no code, hour or gigabyte of anybody's."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_peft.config import ConfigurationError, templates
from megatron_peft.config.templates import render
from megatron_peft.data.tokenizers import template_inputs

NESTED = "{% set a = namespace(v=[]) %}{% set b = namespace(v=[]) %}{% for i in range(60) %}"
NESTED += "{% set a.v = [a.v, a.v] %}{% set b.v = [b.v, b.v] %}{% endfor %}"
LOOP = "{% for i in range(99999) %}BODY{% endfor %}"
MEMORY, LENGTH, TIME = "than 512 MiB of memory", "than 4,194,304 characters", "to an end in 0.1 s of computing"


def growing(start: str, following: str) -> str:
    loop = f"{{% for i in range(60) %}}{{% set x.v = {following} %}}{{% endfor %}}{{{{ x.v|length }}}}"
    return f"{{% set x = namespace(v={start}) %}}{loop}"


LARGE = ("'x' * 10**9", "[1] * 10**10", "'x'.center(2000000000)", "'x'.ljust(10**10)", "'x'.rjust(10**10)")
LARGE += ("'1'.zfill(10**10)", "'%1000000000d' % 1", "'%1000000000d'|format(1)", "'x'|center(10**10)")
LARGE += ("'{:>1000000000}'.format(1)", "'x'|indent(10**10)", "('x' * 10**5).replace('x', 'y' * 10**5)")
LARGE += ("[1]|batch(10**10, 'x')|list",)
GREEDY = {
    **{f"{{{{ {text} }}}}": MEMORY for text in LARGE},
    "{{ ('x' * 10**7).join([''] * 100) }}": f"{TIME}|{MEMORY}",
    growing("'x'", "x.v ~ x.v"): f"{TIME}|{MEMORY}",
    growing("['x']", "x.v + x.v"): f"{TIME}|{MEMORY}",
    growing("7", "x.v * x.v"): f"{TIME}|{MEMORY}",
    "{% set x %}" + LOOP.replace("BODY", "{{ 'x' * 100000 }}") + "{% endset %}": f"{TIME}|{MEMORY}",
    LOOP.replace("BODY", "{{ 'x' * 1000 }}"): f"{TIME}|{LENGTH}",
    "{{ 'x' * 4194305 }}": LENGTH,
    LOOP.replace("BODY", LOOP): TIME,
    f"{NESTED}{{{{ a.v == b.v }}}}": TIME,  # in C, which no handler of a signal interrupts
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{% for i in range(10**12) %}{% endfor %}": "Range too big",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
    "x" * (2**18 + 1): "262,145 characters, above the limit",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    monkeypatch.setattr(templates, "_RENDERER", templates._Renderer())


def refusal(kind: str, template: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        render(kind, template, {})
    return str(refused.value)


def test_a_greedy_template_is_ended_and_told_its_limit(impatient: None) -> None:
    began = time.process_time()
    told = {template: refusal("task", template) for template in GREEDY}
    expected = {template: re.search(part, told[template]) for template, part in GREEDY.items()}
    assert [(template[:60], told[template]) for template, found in expected.items() if not found] == []
    assert time.process_time() - began < 2, "its memory and time were those of another process"
    assert render("task", "{{ 6 * 7 }}", {}) == "42", "which is there again"


def test_a_template_that_had_no_end_is_not_tried_again(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = refusal("chat", LOOP.replace("BODY", LOOP))
    monkeypatch.setattr(templates._RENDERER, "_ask", None)
    assert refusal("chat", LOOP.replace("BODY", LOOP)) == first


@pytest.mark.parametrize("kind", ["task", "chat"])
def test_a_template_reaches_neither_python_nor_files(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for expression in (
        f"cycler.__init__.__globals__.os.system('id > {mark}')",
        f"lipsum.__globals__['os'].system('id > {mark}')",
        f"self.__init__.__globals__.__builtins__.open('{mark}', 'w')",
        "''.__class__.__mro__",
        "('x'|attr('__class__')).mro()",
        "('{0.__class__}'.format(1) or cycler.__init__).x",
        "namespace(__html__=cycler)",
    ):
        told = refusal(kind, f"{{{{ {expression} }}}}")
        assert "unsafe" in told or "undefined" in told or "__html__" in told
    assert "__html__" in refusal(kind, "{% set x = namespace() %}{% set x.__html__ = cycler %}")
    assert "list" in refusal(kind, "{{ [1].append(2) }}") and not mark.exists()


def test_values_are_copies_of_plain_values() -> None:
    class Shouting(str):
        def upper(self) -> str:
            raise AssertionError

    values = {"a": Shouting("é"), "b": (1, [2.5, None]), "c": {1: True}, "d": np.int64(7), "e": Path("\ud800")}
    assert render("task", "{{ [a, b, c, d] }} {{ e }}", values) == "['é', (1, [2.5, None]), {1: True}, 7] \ud800"


def test_each_process_has_its_own(tmp_path: Path) -> None:
    assert render("task", "{{ x }}", {"x": 1}) == "1"
    if (child := os.fork()) == 0:
        os._exit(render("task", "{{ x }}", {"x": 2}) != "2")
    assert render("task", "{{ x }}", {"x": 3}) == "3" and os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("text", ["'x' * 3 * 10**8", "'x'|center(3 * 10**8)", "7**99999999", "(9**9999)**99"])
def test_what_a_chat_template_reads_is_found_within_the_limits(impatient: None, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot be read: .*({MEMORY}|{TIME}|4300 digits)"):
        template_inputs(f"{{{{ {text} }}}}")
    assert template_inputs("{{ messages[0].content }}") == (frozenset({"messages"}), frozenset({"content"}))
