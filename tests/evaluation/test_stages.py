"""Stages are run on two and four ranks by test_generation.py; here the order on a rank that holds two of them."""

from __future__ import annotations

import torch

from megatron_peft.evaluation import stages


class Chunk:
    def __init__(self, name, pre_process, post_process):
        self.name, self.pre_process, self.post_process = name, pre_process, post_process

    def set_input_tensor(self, hidden):
        self.input = hidden


def _run(monkeypatch, chunks):
    log: list[str] = []

    def receive(chunk, message):
        log.append(f"receive {message} for {chunk.name}")
        return torch.zeros(message)

    def forward(chunk):
        log.append(f"run {chunk.name}")
        return torch.ones(1)

    monkeypatch.setattr(stages, "_receive", receive)
    monkeypatch.setattr(stages, "_send", lambda hidden: log.append("send"))
    return stages.run_stages(chunks, (2, 3), forward), log


def test_the_last_of_two_interleaved_ranks_waits_twice_and_has_the_output(monkeypatch):
    output, log = _run(monkeypatch, [Chunk("second", False, False), Chunk("fourth", False, True)])
    assert output is not None
    assert log == [
        "receive (2, 3) for second",
        "run second",
        "send",
        "receive (2, 3) for fourth",
        "run fourth",
    ]


def test_the_first_stage_waits_for_nobody(monkeypatch):
    output, log = _run(monkeypatch, [Chunk("first", True, False)])
    assert output is None and log == ["run first", "send"]
