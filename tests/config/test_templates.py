"""Templates from outside, of task files and of chats, run in a sandbox: they reach neither Python nor files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.config.templates import render_task
from megatron_peft.data.tokenizers import HuggingFaceTokenizer
from tests.data.tiny_tokenizers import save_tokenizer

Render = Callable[[str], str]


@pytest.fixture(params=["task", "chat"])
def render(request: pytest.FixtureRequest, tmp_path: Path) -> Render:
    def render_chat(template: str) -> str:
        tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path)), template)
        return tokenizer.render_chat([{"role": "user", "content": "w1"}])

    return render_chat if request.param == "chat" else lambda template: render_task(template, {})


@pytest.mark.parametrize(
    "expression",
    [
        "cycler.__init__.__globals__.os.system('id > {mark}')",
        "lipsum.__globals__['os'].system('id > {mark}')",
        "self.__init__.__globals__.__builtins__.open('{mark}', 'w')",
        "''.__class__.__mro__.x",
        "('x'|attr('__class__')).mro()",
        "('{{0.__class__}}'.format(1) or cycler.__init__).x",
        "[1].append(2)",
    ],
)
def test_template_reaches_neither_python_nor_files(render: Render, expression: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(ConfigurationError, match="unsafe|undefined|no element|has no attribute"):
        render(f"{{{{ {expression.format(mark=mark)} }}}}")
    assert not mark.exists()


def test_task_template_gets_plain_copies_of_values() -> None:
    class Shouting(str):
        def upper(self) -> str:
            raise AssertionError

    values = {"a": Shouting("é"), "b": (1, [2.5, None]), "c": {1: True}, "d": np.int64(7), "e": Path("x")}
    template = "{{ [a.upper(), b, c, d] }} {{ e }}"
    assert render_task(template, values) == "['É', (1, [2.5, None]), {1: True}, 7] x"


@pytest.mark.parametrize("template", ["{{ x }}", "{% for", "{{ 1 / 0 }}"])
def test_fault_of_a_task_template_is_a_configuration_error(template: str) -> None:
    with pytest.raises(ConfigurationError):
        render_task(template, {})
