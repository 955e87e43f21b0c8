"""`megatron-peft sync`: what a server is asked, in which order, and what is refused; and twenty versions of a run on a
real `vllm serve` under load."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_peft.checkpoint.run_record import find_checkpoint
from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.config.evaluation import SyncSettings
from megatron_peft.conversion.peft_export import PeftAdapter, export_adapter
from megatron_peft.evaluation import sync as evaluated
from megatron_peft.evaluation.model import saved_values
from megatron_peft.models.families import read_shape
from megatron_peft.parallel.collectives import awaited_from_first_rank
from megatron_peft.serving import sync as module
from megatron_peft.serving import trained as serving
from megatron_peft.serving.engine import Engine
from megatron_peft.serving.served import Binding, give_in_memory
from megatron_peft.serving.server import Server
from megatron_peft.serving.trained import lora_of
from megatron_peft.training import live_sync, loop
from megatron_peft.training import run as training
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from tests.evaluation.worded_llama import save_words
from tests.one_rank import one_rank
from tests.serving import runs
from tests.time_limits import seconds
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import VOCAB_SIZE, save_llama, save_pairs

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("ENGINE_PYTHON", ".venv-vllm/bin/python"))


class Recorded:
    """A server that keeps what it is asked, and what it serves."""

    def __init__(self) -> None:
        self.served: dict[str, str | None] = {"base": None}  # name -> folder of an adapter
        self.asked, self.keys = list[str](), set[str | None]()
        self.log_prob: Callable[[int], float] = lambda num_tokens: -1.0
        self.loaded = dict[str, dict[str, torch.Tensor]]()
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
            assert content["ignore_eos"] and content["max_tokens"] == len(content["allowed_token_ids"]) == 1
            answered = self.log_prob(len(content["prompt"]))
            return 200, json.dumps({"choices": [{"logprobs": {"token_logprobs": [answered]}}]})
        name, is_new = content["lora_name"], what == "load_lora_adapter"
        self.asked.append(f"{'load' if is_new else 'unload'} {name}")
        if is_new:
            self.loaded[name] = load_file(Path(content["lora_path"], "adapter_model.safetensors"))
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
            recorded.keys.add(self.headers["Authorization"])
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
    awaits = mock.patch.object(evaluated, "awaited_from_first_rank", side_effect=awaited_from_first_rank)
    with awaits, one_rank(with_groups=False):
        config = read_config(["--load", str(load)], saved=saved_values)
        evaluated.sync_run(config, SyncSettings(url, folder=str(folder), **settings))


def test_a_version_is_loaded_under_a_name_of_its_own_and_the_one_before_goes(server, trained, tmp_path, monkeypatch):
    url, recorded = server
    recorded.served |= {"run-of-another": "/elsewhere", "run-0000008": "/elsewhere/run-0000008"}
    bound = list[Path]()

    def bindings_of(python: Path, base: Path, adapters: list[Path]) -> list[Binding]:
        bound.extend(adapters)
        return [Binding("vLLM 1", 14, 8, ())]

    monkeypatch.setattr(module, "bindings_of", bindings_of)
    monkeypatch.setattr(module, "Engine", lambda *_: nullcontext())
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


def test_an_interrupt_while_a_version_is_compared_unloads_it(server, trained, tmp_path, monkeypatch):
    url, recorded = server

    def interrupts(num_tokens: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return -1.0

    recorded.log_prob = interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            synced(url, trained, tmp_path, skip=("binding",), tolerance=100.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert recorded.asked == ["load run-0000006", "ask base", "unload run-0000006"] and [*recorded.served] == ["base"]
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_what_an_interrupt_keeps_from_being_compared_is_not_served(server, trained, tmp_path, monkeypatch):
    url, recorded = server

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Sync, "_compared", interrupted)
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
    recorded.log_prob = lambda _: answered
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
    monkeypatch.setattr(evaluated, "SECONDS_BETWEEN", 0.01)
    with pytest.raises(KeyboardInterrupt):
        synced(url, trained, tmp_path, skip=("binding",), tolerance=100.0, follow=True)
    told = ["load run-0000002", "ask base", "ask run-0000002", "load run-0000004", "ask run-0000004"]
    assert recorded.asked == [*told, "unload run-0000002"]
    assert len(set(re.findall(r"our own (\S+),", capsys.readouterr().out))) == 2


def words_of_a_run(folder: Path) -> list[str]:
    base, data = save_llama(folder / "base", **runs.SIZES), save_pairs(folder / "pairs.jsonl")
    words = [*runs.RUN.split(), "--vocab-size", str(VOCAB_SIZE - 1), "--pretrained-checkpoint", str(base)]
    return [*words, "--train-data-path", str(data), "--save", str(folder / "run")]


def test_a_run_gives_its_adapters_every_so_many_steps_and_trains_as_without(server, tmp_path, monkeypatch, capsys):
    url, recorded = server
    recorded.served, recorded.log_prob = {"of another": "/elsewhere", "base": None}, lambda num_tokens: -num_tokens
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    lora = ("--peft-method", "lora", "--lora-rank", "8")
    for name in ("alone", "synced"):
        (tmp_path / name).mkdir()
    _, alone = runs.trained(tmp_path / "alone", *lora)
    flags = ("--sync-server", url, "--sync-interval", "4", "--sync-skip", "binding", "--sync-tolerance", "100")
    _, run = runs.trained(tmp_path / "synced", *lora, *flags)
    told = ["load run-0000004", "ask base", "ask run-0000004"]
    told += ["load run-0000006", "ask run-0000006", "unload run-0000004"]  # the last step's, whatever the interval
    assert recorded.asked == told and recorded.keys == {"Bearer secret"}
    assert [line["loss"] for line in read_metrics(run / METRICS_FILE)] == [
        line["loss"] for line in read_metrics(alone / METRICS_FILE)
    ]
    assert Path(str(recorded.served["run-0000006"])).parent == run / "served"
    saved = load_file(export_adapter(run, tmp_path / "exported") / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in recorded.loaded["run-0000006"].items())
    assert not all(torch.equal(tensor, saved[name]) for name, tensor in recorded.loaded["run-0000004"].items())
    printed = capsys.readouterr().out
    owns = re.findall(r"run-\d+: log-probability of a token -13.750000, our own (\S+),", printed)
    assert len(set(owns)) == 2
    synced(url, run, tmp_path / "again", skip=("binding",), tolerance=100.0, name="again")
    (own,) = re.findall(r"our own (\S+),", capsys.readouterr().out)
    assert float(own) == pytest.approx(float(owns[-1]), abs=2e-6)  # a validation's forward, and that of a scored answer


def trained_with(folder: Path, *flags: str) -> None:
    with one_rank(with_groups=False):
        training.finetune(read_config([*words_of_a_run(folder), *flags]))


def test_a_version_that_is_refused_while_it_is_trained_is_a_warning(server, tmp_path, monkeypatch, capsys):
    url, recorded = server
    flags = ("--sync-server", url, "--sync-interval", "2", "--sync-skip", "binding", "--sync-folder", str(tmp_path))
    answers = iter([2.0, 2.0, 3.0])
    monkeypatch.setattr(live_sync, "validation_loss", lambda *_: next(answers))
    trained_with(tmp_path, "--peft-method", "lora", *flags)
    assert [*recorded.served] == ["base"] and not [*tmp_path.glob("run-*")]
    told = re.findall("WARNING: iteration (.*)", capsys.readouterr().out)
    apart = "was not given to the server: run-000000{0}: log-probability of a token -1.000000, our own -{1}.000000, the"
    apart += " base's -1.000000: more apart than --sync-tolerance 0.001. Training continues."
    assert told == [f"{at} {apart.format(at, own)}" for at, own in ((2, 2), (4, 2), (6, 3))]


def test_a_server_that_is_gone_is_told_at_length_once(server, tmp_path, monkeypatch, capsys):
    url, recorded = server
    after_step, compared = live_sync.LiveSync.after_step, list[Any]()

    def goes(live: Any, state: Any, is_last: bool) -> str:  # after the look at the start; it comes back for one step
        recorded.refuses = {} if state.position.iteration == 3 else {"models": (503, "gone")}
        return after_step(live, state, is_last)

    monkeypatch.setattr(live_sync, "validation_loss", lambda *given: compared.append(given) or 1.0)
    monkeypatch.setattr(live_sync.LiveSync, "after_step", goes)
    flags = ("--sync-server", url, "--sync-interval", "1", "--sync-skip", "binding", "numbers")
    trained_with(tmp_path, "--peft-method", "lora", *flags)
    told = re.findall("WARNING: iteration (.*)", capsys.readouterr().out)
    at_length = [
        line for line in told if f"was not given to the server: --sync-server {url} refuses /v1/models" in line
    ]
    assert [line[0] for line in at_length] == ["1", "4"] and compared == []
    shortly = "was not given to the server: for the same reason. Training continues."
    assert [line for line in told if line not in at_length] == [f"{at} {shortly}" for at in (2, 5, 6)]


def test_a_run_that_no_lora_equals_is_told_once_and_trained(server, tmp_path, monkeypatch, capsys):
    url, recorded = server
    monkeypatch.setattr(serving, "VLLM_RANKS", (1, 8))
    flags = ("--sync-server", url, "--sync-interval", "2", "--sync-skip", "binding", "numbers")
    trained_with(tmp_path, "--peft-method", "boft", "--boft-block-size", "8", *flags)
    printed = capsys.readouterr().out
    told = re.findall("WARNING: (nothing is given to the server any more: no LoRA of rank 8 equals .*run: .*)", printed)
    assert len(told) == 1 and recorded.asked == [] and "trained 6 iterations" in printed


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--peft-method", "full"], "--peft-method full trains no adapter: merge or convert it"),
        (["--peft-method", "lora", "--sync-server", "http://127.0.0.1:1"], "1:1 does not answer .*vllm serve BASE"),
        (["--peft-method", "lora", "--sync-engine-python", "/none"], "^--sync-engine-python /none cannot be started"),
    ],
    ids=["nothing to serve", "no server", "no engine"],
)
def test_a_run_that_cannot_be_synced_ends_before_a_model_is_loaded(server, flags, told, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "build_state", None)
    with pytest.raises(ConfigurationError, match=told):
        trained_with(tmp_path, "--sync-server", server[0], *flags)


def test_a_family_that_no_lora_is_served_of_is_told_at_the_start(tmp_path):
    shape = read_shape(str(save_bloom(tmp_path / "bloom")))
    with pytest.raises(ConfigurationError, match="vLLM takes no LoRA for BloomForCausalLM: merge the run"):
        module.started_sync(SyncSettings("http://127.0.0.1:1"), PeftConfig(), shape, None, tmp_path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sync-server", "foo"], "--sync-server foo: give an address"),
        (["--sync-server", "http://x", "--sync-name", "a/b"], "--sync-name a/b: give letters"),
    ],
)
def test_settings_of_a_sync_are_named_as_they_were_typed(flags, told, tmp_path):
    with pytest.raises(ConfigurationError, match=told):
        read_config([*words_of_a_run(tmp_path), *flags])


def test_a_run_that_ends_early_gives_its_last_step_once_it_is_saved(server, tmp_path, capsys):
    url, recorded = server
    flags = ("--sync-server", url, "--sync-interval", "4", "--sync-skip", "binding", "numbers", "--exit-interval", "5")
    trained_with(tmp_path, "--peft-method", "lora", *flags)
    assert recorded.asked == ["load run-0000004", "load run-0000005", "unload run-0000004"]
    printed = capsys.readouterr().out
    assert printed.index("saved iteration 5") < printed.index("serves run-0000005")


def test_a_run_that_is_asked_to_stop_gives_nothing_more(server, tmp_path, monkeypatch):
    url, recorded = server
    monkeypatch.setattr(loop._Run, "_wants_to_stop", lambda run: run.state.position.iteration == 4)
    flags = ("--sync-server", url, "--sync-interval", "2", "--sync-skip", "binding", "numbers")
    trained_with(tmp_path, "--peft-method", "lora", *flags)
    assert recorded.asked == ["load run-0000002", "load run-0000004", "unload run-0000002"]


def test_what_cannot_be_written_names_the_flag_of_the_folder(server, tmp_path, trained, monkeypatch):
    def full(*_: Any) -> None:
        raise ConfigurationError("--output x could not be written: give another --output.")

    monkeypatch.setattr(module, "export_lora", full)
    sync = module.Sync(SyncSettings(server[0], folder=str(tmp_path)), tmp_path, trained, "--sync-")
    with pytest.raises(ConfigurationError, match="^--sync-folder x could not be written: give another --sync-folder"):
        sync.give(find_checkpoint(trained), None, [])


def test_an_adapter_in_memory_that_is_not_bound_whole_is_not_kept():
    found: Any = json.loads(Path(__file__).with_name("recorded.json").read_text())
    asked = list[Any]()

    class Asked:
        name = "vLLM 1"

        def ask(self, what: str, **how: Any) -> dict[str, Any]:
            asked.append((what, how.get("is_kept")))
            return {"slots": found["slots"], "found": found["adapters"][self.at]}

    for Asked.at in (0, 1):
        adapter = PeftAdapter(found["settings"][Asked.at], {}, lambda: [("a", torch.zeros(2))])
        refused = pytest.raises(ConfigurationError, match="bound to nothing")
        with refused if Asked.at else nullcontext():
            give_in_memory(Asked(), adapter)  # type: ignore[arg-type]
    assert asked == [("give", None), ("keep", True), ("give", None), ("keep", False)]


def test_a_server_that_hangs_is_told_after_some_time():
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ConfigurationError, match="not answer"):
        Server(f"http://127.0.0.1:{listening.getsockname()[1]}", seconds=0.2).models()


BROKEN = {
    "a redirection to nowhere": b"HTTP/1.0 302 Found\r\nLocation: http://[x\r\n\r\n",
    "cut off": b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "no HTTP": b"garbage\r\n\r\n",
    "a refusal cut off": b"HTTP/1.0 500 Oh\r\nContent-Length: 100\r\n\r\nno",
    "no UTF-8": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    "nothing": b"",
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_is_broken_is_told(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection:
                connection.recv(2**16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(ConfigurationError, match="--sync-server http"):
            Server(f"http://127.0.0.1:{listening.getsockname()[1]}", "--sync-server").models()
        thread.join()


def test_an_adapter_of_other_shapes_is_bound_anew(trained, tmp_path, monkeypatch):
    syncing = module.Sync(SyncSettings("http://127.0.0.1:1", folder=str(tmp_path)), tmp_path, trained)
    bound = list[Path]()
    monkeypatch.setattr(module, "bindings_of", lambda *given: bound.extend(given[2]) or [Binding("vLLM 1", 1, 4, ())])
    for name, features, alpha in (("a", 8, 1), ("b", 8, 1), ("c", 16, 1), ("d", 16, 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(f'{{"r": 4, "lora_alpha": {alpha}}}')
        save_file({"q.lora_A.weight": torch.zeros(4, features)}, tmp_path / name / "adapter_model.safetensors")
        syncing._require_bound(tmp_path / name)
    assert [path.name for path in bound] == ["a", "c", "d"]


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
    monkeypatch.setattr(evaluated, "load_model", None)
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


GIVEN = {"lora": ("--lora-rank", "8"), "hybrid": ("--lora-rank", "4", "--lora-ga-batches", "1")}


@pytest.mark.engines
@pytest.mark.parametrize("method", GIVEN)
def test_an_engine_of_ours_gets_versions_from_memory_and_computes_what_the_run_does(method, tmp_path, monkeypatch):
    words = [*words_of_a_run(tmp_path), "--peft-method", method, *GIVEN[method], "--seq-length", "256"]
    monkeypatch.setattr(module, "PREFIXES", (1, 5, 220))  # the last is more than a block of the cache of prefixes
    given = list[tuple[float, float]]()
    with Engine(PYTHON) as engine, one_rank(with_groups=False):
        engine.open(
            tmp_path / "base", [], {"dtype": "float32", "enable_lora": True, "max_loras": 2, "max_lora_rank": 128}
        )

        def mean(asked: Any) -> float:
            answers = engine.ask("log_probs", prompts=[list(tokens) for tokens, _ in asked])["log_probs"]
            return fmean(one[last] for one, (_, last) in zip(answers[-1], asked, strict=True))

        loaded, ask = list[int](), engine.ask

        def noted(what: str, **how: Any) -> dict[str, Any]:
            answer = ask(what, **how)
            loaded.extend([answer["loaded"]] if how.get("is_kept") else [])
            return answer

        monkeypatch.setattr(engine, "ask", noted)

        class InProcess:
            def give(self, run: Any, own: float, asked: Any) -> str:
                adapter = lora_of(run)
                wrong = adapter._replace(config={**adapter.config, "target_modules": ["q_proj", "embed_tokens"]})
                with pytest.raises(ConfigurationError, match="missing, though target_modules names them: .*embed_tok"):
                    give_in_memory(engine, wrong)
                before = mean(asked)
                assert not given or before == pytest.approx(given[-1][0], abs=1e-6)
                bound = give_in_memory(engine, lora_of(run))
                given.append((mean(asked), own))
                assert abs(given[-1][0] - before) > 1e-3
                return str(bound)

        monkeypatch.setattr(live_sync, "started_sync", lambda *_, **__: InProcess())
        training.finetune(read_config([*words, "--sync-server", "http://none", "--sync-interval", "2"]))
    assert len(given) == 3 and {*loaded} == {1} and not [*tmp_path.rglob("adapter_model.safetensors")]
    assert max(abs(served - own) for served, own in given) < 5e-5, given


@pytest.mark.engines
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_program_of_the_page_runs(tmp_path, num_ranks):
    page = (ROOT / "docs" / "moving-weights.md").read_text()
    code = page[page.index("### While it is trained") :].split("```python\n")[1].split("```")[0]
    assert "Engine())" in code
    (tmp_path / "my_run.py").write_text(code.replace("Engine())", f"Engine(Path({str(PYTHON.absolute())!r})))"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    words = [*words_of_a_run(tmp_path), "--peft-method", "lora", "--lora-rank", "4"]
    words += ["--tensor-model-parallel-size", str(num_ranks)]
    ran = subprocess.run(
        [*torchrun, "my_run.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=seconds(300)
    )
    scores = re.findall(r"binds 14 modules, rank 4: \{'scores': \[\[(\S+), ", ran.stdout)
    assert ran.returncode == 0 and len({*scores}) == 6, ran.stdout + ran.stderr


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


@pytest.mark.engines
def test_a_run_at_tp2_gives_its_versions_while_it_is_trained(tmp_path):
    words, base = [*words_of_a_run(tmp_path), "--peft-method", "lora", "--lora-rank", "8"], tmp_path / "base"
    save_words(base)
    with vllm_serve(base, tmp_path / "log.txt") as url:
        words += ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--sync-server", url]
        words += ["--sync-interval", "2", "--sync-engine-python", str(PYTHON), "--sync-tolerance", "2e-5"]
        run = subprocess.run(
            [sys.executable, "-m", "megatron_peft", "train", *words],
            capture_output=True,
            text=True,
            timeout=seconds(300),
        )
        assert run.returncode == 0 and "WARNING: " not in run.stdout, run.stdout + run.stderr
        given = re.findall(
            r"serves (run-\d+): log-probability of a token (\S+), our own (\S+), the base's (\S+);?", run.stdout
        )
        assert [name for name, *_ in given] == ["run-0000002", "run-0000004", "run-0000006"]
        assert len({own for _, _, own, _ in given}) == 3
        assert "vLLM" in run.stdout and "binds 14 modules, rank 8" in run.stdout
        assert [one["id"] for one in Server(url).models()] == [str(base), "run-0000006"]
