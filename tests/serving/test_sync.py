"""`megatron-peft sync`: what a server is asked, in which order, and what is refused; and twenty versions of a run on a
real `vllm serve` under load."""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

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
        self.served, self.asked, self.log_prob = ["base"], list[str](), -1.0
        self.refuses: dict[str, tuple[int, str]] = {}

    def answer(self, path: str, content: Any) -> tuple[int, str]:
        what = path.rsplit("/", 1)[-1]
        if what in self.refuses:
            return self.refuses[what]
        if what == "models":
            names = [{"id": name, "parent": "base" if number else None} for number, name in enumerate(self.served)]
            return 200, json.dumps({"data": names})
        if what == "completions":
            self.asked += [f"ask {content['model']}"] * (len(content["prompt"]) == 1)
            assert content["max_tokens"] == len(content["allowed_token_ids"]) == 1
            return 200, json.dumps({"choices": [{"logprobs": {"token_logprobs": [self.log_prob]}}]})
        name, is_new = content["lora_name"], what == "load_lora_adapter"
        self.asked.append(f"{'load' if is_new else 'unload'} {name}")
        if is_new:
            assert Path(content["lora_path"], "adapter_model.safetensors").is_file()
        (self.served.append if is_new else self.served.remove)(name)
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
    recorded.served.append("run-of-another")
    bound = list[Path]()

    def bindings_of(python: Path, base: Path, adapters: list[Path]) -> list[Binding]:
        bound.extend(adapters)
        return [Binding("vLLM 1", 14, 8, ())]

    monkeypatch.setattr(module, "bindings_of", bindings_of)
    for step in (2, 4, 4):
        synced(url, trained / f"iter_000000{step}", tmp_path, skip=("numbers",))
    assert recorded.asked == ["load run-0000002", "load run-0000004", "unload run-0000002"]
    assert recorded.served == ["base", "run-of-another", "run-0000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bound.json", "run-0000004"]
    assert [path.name for path in bound] == ["run-0000002"]  # what looks the same binds the same
    monkeypatch.setattr(module, "bindings_of", lambda *_: [Binding("vLLM 1", 13, 8, ("missing: o_proj",))])
    (tmp_path / "bound.json").write_text('{"digest": "another adapter"}')
    with pytest.raises(ConfigurationError, match="run-0000006: missing: o_proj"):
        synced(url, trained, tmp_path, skip=("numbers",))
    assert recorded.served == ["base", "run-of-another", "run-0000004"]


def test_a_version_that_is_computed_otherwise_is_unloaded_again(server, trained, tmp_path):
    url, recorded = server
    recorded.served.append("run-0000001")
    told = "run-0000006: log-probability of a token -1.000000, our own -.*: more apart than --tolerance 0.001"
    with pytest.raises(ConfigurationError, match=told):
        synced(url, trained, tmp_path, skip=("binding",))
    assert recorded.asked == ["load run-0000006", "ask base", "ask run-0000006", "unload run-0000006"]
    synced(url, trained, tmp_path, skip=("binding",), tolerance=100.0, name="mine")
    assert recorded.served == ["base", "run-0000001", "mine-0000006"]


def test_each_new_checkpoint_is_given_until_it_is_interrupted(server, trained, tmp_path, monkeypatch):
    url, recorded = server
    steps = iter([2, 2, 2, 4])  # the first look is for the run's name

    def newest(run: Path) -> Path:
        try:
            return trained / f"iter_{next(steps):07d}"
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module.run_record, "find_checkpoint", newest)
    monkeypatch.setattr(module, "export_lora", lambda _, folder, base: exported(folder))
    monkeypatch.setattr(module, "SECONDS_BETWEEN", 0.01)

    def exported(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").touch()
        return folder

    with pytest.raises(KeyboardInterrupt):
        synced(url, trained, tmp_path, skip=("numbers", "binding"), follow=True)
    assert recorded.asked == ["load run-0000002", "load run-0000004", "unload run-0000002"]


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
    assert not any(tmp_path.iterdir())


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
    """Each is compared with our own model, so an answer from the cache of an earlier one would be refused."""
    flags = "--peft-method lora --lora-rank 8 --train-iters 20 --save-interval 1"
    base, run = runs.trained(tmp_path, *flags.split())
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
    assert served == [name, "run-0000020"]
    told = [line for line in capsys.readouterr().out.splitlines() if " serves run-" in line]
    assert len(told) == 20 and len({line.split("our own ")[1].split(",")[0] for line in told}) == 20
    assert [path.name for path in (tmp_path / "served").iterdir() if path.is_dir()] == ["run-0000020"]
