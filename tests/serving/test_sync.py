"""`megatron-peft sync`: what a server is asked, in which order, and what is refused; and twenty versions of a run on a
real `vllm serve` under load."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import SyncSettings
from megatron_peft.evaluation import sync as module
from megatron_peft.evaluation.model import saved_values
from megatron_peft.serving.served import Binding
from megatron_peft.serving.server import Server
from tests.evaluation.worded_llama import save_words
from tests.one_rank import one_rank
from tests.serving import runs
from tests.time_limits import seconds

PYTHON = Path(os.environ.get("ENGINE_PYTHON", ".venv-vllm/bin/python"))


class Recorded:
    """A server that keeps what it is asked, and what it serves."""

    def __init__(self) -> None:
        self.served: dict[str, str | None] = {"base": None}  # name -> folder of an adapter
        self.asked, self.log_prob = list[str](), -1.0
        self.refuses: dict[str, tuple[int, str]] = {}

    def answer(self, path: str, content: Any) -> tuple[int, str]:
        what = path.rsplit("/", 1)[-1]
        if what in self.refuses:
            return self.refuses[what]
        if what == "models":
            served = self.served.items()
            told = [{"id": name, "root": root, "parent": root and "base"} for name, root in served]
            return 200, json.dumps({"data": told})
        if what == "completions":
            self.asked += [f"ask {content['model']}"] * (len(content["prompt"]) == 1)
            assert content["max_tokens"] == len(content["allowed_token_ids"]) == 1
            return 200, json.dumps({"choices": [{"logprobs": {"token_logprobs": [self.log_prob]}}]})
        name, is_new = content["lora_name"], what == "load_lora_adapter"
        self.asked.append(f"{'load' if is_new else 'unload'} {name}")
        if is_new:
            assert Path(content["lora_path"], "adapter_model.safetensors").is_file()
        if is_new:
            self.served[name] = content["lora_path"]
        else:
            del self.served[name]
        return 200, "Success"


@pytest.fixture
def server() -> Iterator[tuple[str, Recorded]]:
    recorded = Recorded()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, content: Any) -> None:
            code, text = recorded.answer(self.path, content)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", recorded
        http.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return runs.trained(folder, "--peft-method", "lora", "--lora-rank", "8", "--save-interval", "2")[1]


def synced(url: str, load: Path, folder: Path, **settings: Any) -> None:
    with one_rank(with_groups=False):
        config = read_config(["--load", str(load)], saved=saved_values)
        module.sync_run(config, SyncSettings(url, folder=str(folder), **settings))


def test_a_version_is_loaded_under_a_name_of_its_own_and_the_one_before_goes(server, trained, tmp_path, monkeypatch):
    url, recorded = server
    recorded.served |= {"run-of-another": "/elsewhere", "run-0000008": "/elsewhere/run-0000008"}
    bound = list[Path]()

    def bindings_of(python: Path, base: Path, adapters: list[Path]) -> list[Binding]:
        bound.extend(adapters)
        return [Binding("vLLM 1", 14, 8, ())]

    monkeypatch.setattr(module, "bindings_of", bindings_of)
    for step in (2, 4, 4):
        synced(url, trained / f"iter_000000{step}", tmp_path, skip=("numbers",))
    assert recorded.asked == ["load run-0000002", "load run-0000004", "unload run-0000002"]
    names = ["base", "run-of-another", "run-0000008", "run-0000004"]
    assert [*recorded.served] == names
    (served,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert recorded.served["run-0000004"] == str(served) and served.name.startswith("run-0000004-")
    assert [path.name[:11] for path in bound] == ["run-0000002"]  # what looks the same binds the same
    monkeypatch.setattr(module, "bindings_of", lambda *_: [Binding("vLLM 1", 13, 8, ("missing: o_proj",))])
    (tmp_path / "bound.json").write_text('{"digest": "another adapter"}')
    with pytest.raises(ConfigurationError, match="run-0000006-.*: missing: o_proj"):
        synced(url, trained, tmp_path, skip=("numbers",))
    assert [*recorded.served] == names
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [served]


def test_a_name_that_comes_again_lies_under_another_path_and_is_given_unless_it_was_seen_to_be_this(
    server, trained, tmp_path
):
    """vLLM's cache of prefixes knows an adapter by its name and path."""
    url, recorded = server
    roots = list[str | None]()
    for step in (4, 2, 4):
        synced(url, trained / f"iter_000000{step}", tmp_path, skip=("binding",), tolerance=100.0)
        roots.append(recorded.served[f"run-000000{step}"])
    assert len(set(roots)) == 3
    recorded.asked.clear()
    (tmp_path / Path(str(roots[-1])).name / module.SEEN).unlink()
    synced(url, trained / "iter_0000004", tmp_path, skip=("binding",), tolerance=100.0)
    assert recorded.asked == ["unload run-0000004", "load run-0000004", "ask base", "ask run-0000004"]
    recorded.asked.clear()
    for skip in (("binding",), ("binding", "numbers")):  # it was compared: nothing more is asked
        synced(url, trained / "iter_0000004", tmp_path, skip=skip, tolerance=100.0)
    assert recorded.asked == []
    synced(url, trained / "iter_0000002", tmp_path, skip=("binding", "numbers"))
    synced(url, trained / "iter_0000002", tmp_path, skip=("binding",), tolerance=100.0)
    told = ["load run-0000002", "unload run-0000004", "unload run-0000002", "load run-0000002"]
    assert recorded.asked == [*told, "ask base", "ask run-0000002"]
    synced(url, trained / "iter_0000004", tmp_path, skip=("binding", "numbers"))
    another = tmp_path / "another"
    with pytest.raises(ConfigurationError, match="serves run-0000004 from .*, not from here: give another --name"):
        synced(url, trained / "iter_0000004", another, skip=("binding",), tolerance=100.0)
    assert not any(path.is_dir() for path in another.iterdir())


def test_what_an_interrupt_keeps_from_being_compared_is_not_served(server, trained, tmp_path, monkeypatch):
    url, recorded = server

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Sync, "_compared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synced(url, trained, tmp_path, skip=("binding",))
    assert recorded.asked == ["load run-0000006", "unload run-0000006"] and [*recorded.served] == ["base"]
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_one_sync_gives_from_a_folder_that_it_can_write(server, trained, tmp_path):
    url, recorded = server
    lock = f"import fcntl, time; file = open({str(tmp_path / module.LOCK)!r}, 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    words = [sys.executable, "-c", f"{lock}; print(1, flush=True); time.sleep(600)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(ConfigurationError, match="another sync gives its versions from there"):
            synced(url, trained, tmp_path, skip=("binding", "numbers"))
        holder.kill()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="--folder .*file/served cannot be written"):
        synced(url, trained, tmp_path / "file" / "served", skip=("binding", "numbers"))
    assert recorded.asked == []


@pytest.mark.parametrize("answered", [-1.0, -50.0])
def test_a_version_that_is_computed_otherwise_is_unloaded_again(server, trained, tmp_path, answered):
    url, recorded = server
    recorded.log_prob = answered
    recorded.served["run-0000001"] = str(tmp_path / "run-0000001-x")
    told = f"run-0000006: log-probability of a token {answered:.6f}, our own -.*: more apart than --tolerance 0.001"
    with pytest.raises(ConfigurationError, match=told):
        synced(url, trained, tmp_path, skip=("binding",))
    assert recorded.asked == ["load run-0000006", "ask base", "ask run-0000006", "unload run-0000006"]
    synced(url, trained, tmp_path, skip=("binding",), tolerance=100.0, name="mine")
    assert [*recorded.served] == ["base", "run-0000001", "mine-0000006"]


def test_each_new_checkpoint_is_given_with_its_own_numbers_until_it_is_interrupted(
    server, trained, tmp_path, monkeypatch, capsys
):
    url, recorded = server
    steps, find = iter([2, 2, 2, 4]), module.run_record.find_checkpoint  # the first look is for the run's name

    def newest(run: Path) -> Path:
        if run != trained:
            return find(run)
        try:
            return trained / f"iter_{next(steps):07d}"
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module.run_record, "find_checkpoint", newest)
    monkeypatch.setattr(module, "SECONDS_BETWEEN", 0.01)
    with pytest.raises(KeyboardInterrupt):
        synced(url, trained, tmp_path, skip=("binding",), tolerance=100.0, follow=True)
    told = ["load run-0000002", "ask base", "ask run-0000002", "load run-0000004", "ask run-0000004"]
    assert recorded.asked == [*told, "unload run-0000002"]
    assert len(set(re.findall(r"our own (\S+),", capsys.readouterr().out))) == 2


def test_an_adapter_of_other_shapes_is_bound_anew(trained, tmp_path, monkeypatch):
    config = read_config(["--load", str(trained)], saved=saved_values)
    syncing = module._Sync(config, SyncSettings("http://127.0.0.1:1", folder=str(tmp_path)), trained)
    bound = list[Path]()
    monkeypatch.setattr(module, "bindings_of", lambda *given: bound.extend(given[2]) or [Binding("vLLM 1", 1, 4, ())])
    for name, features in (("a", 8), ("b", 8), ("c", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"r": 4}')
        save_file({"q.lora_A.weight": torch.zeros(4, features)}, tmp_path / name / "adapter_model.safetensors")
        syncing._require_bound(tmp_path / name)
    assert [path.name for path in bound] == ["a", "c"]


@pytest.mark.parametrize("answer", ["[]", '{"data": 5}', '{"choices": [{}]}', "no JSON", '{"data": [{}]}'])
def test_an_answer_of_something_else_is_told(server, answer):
    url, recorded = server
    recorded.refuses |= {"models": (200, answer), "completions": (200, answer)}
    for ask in (lambda: Server(url).models(), lambda: Server(url).log_prob("base", [1], 2)):
        with pytest.raises(ConfigurationError, match="/v1/"):
            ask()


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [
        (404, '{"detail":"Not Found"}', "404 .*start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (400, "rank 8 is above max_lora_rank 4", "400 .*rank 8 is above max_lora_rank 4"),
    ],
)
def test_what_a_server_refuses_is_told(server, tmp_path, code, said, told):
    url, recorded = server
    recorded.refuses["load_lora_adapter"] = code, said
    with pytest.raises(ConfigurationError, match=told):
        Server(url).load("run-1", tmp_path)


def test_a_server_that_is_not_there_is_told_before_the_model_is_loaded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)
    with pytest.raises(ConfigurationError, match="http://127.0.0.1:1 does not answer .*vllm serve BASE"):
        synced("http://127.0.0.1:1", trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [module.LOCK]


@contextmanager
def vllm_serve(base: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    limits = "--enable-lora --max-lora-rank 8 --max-loras 2 --dtype float32 --enforce-eager"
    words = [str(PYTHON.with_name("vllm")), "serve", str(base), *limits.split(), "--host", "127.0.0.1", "--port", port]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as told, subprocess.Popen(words, stdout=told, stderr=told, env=os.environ | settings) as process:
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + seconds(300)
            while time.monotonic() < until and process.poll() is None:
                try:
                    Server(url).models()
                    break
                except ConfigurationError:
                    time.sleep(0.5)
            else:
                pytest.fail(log.read_text()[-3000:])
            yield url
        finally:
            process.terminate()


@contextmanager
def under_load(ask: Callable[[], Any]) -> Iterator[list[float]]:
    """Two clients that ask again and again; how long each answer took."""
    taken, ends = list[float](), threading.Event()

    def client() -> None:
        while not ends.is_set():
            began = time.monotonic()
            ask()
            taken.append(time.monotonic() - began)

    clients = [threading.Thread(target=client) for _ in range(2)]
    for each in clients:
        each.start()
    try:
        yield taken
    finally:
        ends.set()
        for each in clients:
            each.join()


@pytest.mark.engines
def test_twenty_versions_are_served_under_load(tmp_path, capsys):
    """And one whose name was served before is not answered from the cache of prefixes that the earlier one has left."""
    flags = "--peft-method lora --lora-rank 8 --train-iters 20 --save-interval 1"
    base, run = runs.trained(tmp_path, *flags.split())
    (tmp_path / "other").mkdir()
    _, other = runs.trained(tmp_path / "other", *flags.split(), "--lr", "4e-2")
    save_words(base)
    with vllm_serve(base, tmp_path / "log.txt") as url:
        server = Server(url)
        name = server.models()[0]["id"]
        with under_load(lambda: server.log_prob(name, [*range(1, 60)], 7)) as taken:
            for step in range(1, 21):
                checkpoint = run / f"iter_{step:07d}"
                synced(url, checkpoint, tmp_path / "served", engine_python=PYTHON, tolerance=2e-5)
        assert len(taken) > 20
        served = [one["id"] for one in server.models()]
        prompt = [*range(1, 240)]  # of more than a block of the cache
        answered = [server.log_prob("run-0000020", prompt, 7)]
        for checkpoint in (run / "iter_0000002", other / "iter_0000020"):
            synced(url, checkpoint, tmp_path / "served", name="run", engine_python=PYTHON, tolerance=2e-5)
        server.load("fresh", Path(next(one["root"] for one in server.models() if one["id"] == "run-0000020")))
        answered += [server.log_prob(one, prompt, 7) for one in ("run-0000020", "fresh")]
    assert answered[1] == pytest.approx(answered[2], abs=1e-5) != pytest.approx(answered[0], abs=1e-2)
    assert served == [name, "run-0000020"]
    told = [line for line in capsys.readouterr().out.splitlines() if " serves run-" in line][:20]
    assert len(told) == 20 and len({line.split("our own ")[1].split(",")[0] for line in told}) == 20
    assert [path.name[:11] for path in (tmp_path / "served").iterdir() if path.is_dir()] == ["run-0000020"]
