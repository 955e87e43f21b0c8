"""Whatever happens to a file of a checkpoint, the manifest sees it and names the file."""

from __future__ import annotations

import random

import pytest

from megatron_peft.checkpoint.manifest import MANIFEST, damage, measure, read_manifest, write_manifest

CONTENTS = {"__0_0.distcp": bytes(range(256)) * 40, ".metadata": b"names", "run_record.json": b'{"a": 1}', "empty": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, {})
    return tmp_path


def test_what_nobody_touched_is_whole(folder):
    assert damage(folder) == []
    assert read_manifest(folder)["__0_0.distcp"] == (10240, measure(folder / "__0_0.distcp").crc32)


def test_every_flipped_byte_is_found(folder):
    """Of the manifest itself too; all of the small files, samples of the large one."""
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for offset in range(len(whole)) if len(whole) < 1000 else draw.sample(range(len(whole)), 200):
            torn = bytearray(whole)
            torn[offset] ^= 1 << draw.randrange(8)
            path.write_bytes(torn)
            (problem,) = damage(folder)
            assert problem.startswith(path.name), (path.name, offset)
        path.write_bytes(whole)
    assert damage(folder) == []


def test_every_truncation_and_every_growth_is_found(folder):
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        lengths = range(len(whole)) if len(whole) < 1000 else range(0, len(whole), 97)
        for changed in [*(whole[:length] for length in lengths), whole + b"\0"]:
            path.write_bytes(changed)
            (problem,) = damage(folder)
            assert problem.startswith(path.name), (path.name, len(changed))
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*CONTENTS, MANIFEST])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    (problem,) = damage(folder)
    assert problem.startswith(name)


def test_the_shares_of_all_ranks_cover_every_file(folder):
    for name in CONTENTS:
        (folder / name).unlink()
    for num_ranks in (1, 3, 7):
        found = [damage(folder, rank, num_ranks) for rank in range(num_ranks)]
        assert sorted(sum(found, [])) == sorted(f"{name} is missing" for name in CONTENTS)
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_files_that_their_writers_measured_are_not_read_again(folder):
    known = {"__0_0.distcp": measure(folder / "__0_0.distcp")}
    (folder / "__0_0.distcp").write_bytes(b"changed on the way to the disk")
    write_manifest(folder, known)
    (problem,) = damage(folder)
    assert problem == "__0_0.distcp has 30 bytes instead of 10240"
