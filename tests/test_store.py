"""Files on disk: whole or not there, damage noticed and kept, one writer at a time."""

import json
import multiprocessing
import time

import pandas as pd
import pytest

from nc_nbdev.lab.store import DamagedFile, Entry, atomic


@pytest.fixture
def entry(tmp_path):
    entry = Entry(tmp_path / "entry")
    with entry.write("a.bin") as draft: draft.write_bytes(bytes(range(200)))
    entry.write_json("b.json", {"x": 1})
    entry.write_table("c.parquet", pd.DataFrame({"n": [1, 2, 3]}))
    return Entry(entry.folder)


def test_what_is_written_is_read(entry):
    assert entry.path("a.bin").read_bytes() == bytes(range(200)) and entry.read_json("b.json") == {"x": 1}
    assert entry.read_table("c.parquet").n.tolist() == [1, 2, 3]
    assert set(entry.manifest()) == {"a.bin", "b.json", "c.parquet"}


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "empty": lambda p: p.write_bytes(b""),
    "a flipped byte": lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "another file": lambda p: p.write_bytes(b"x" * p.stat().st_size),
}


@pytest.mark.parametrize("name", ["a.bin", "b.json", "c.parquet"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_kept(entry, name, damage):
    file = entry.folder / name
    damage(file)
    bytes_now = file.read_bytes()
    with pytest.raises(DamagedFile, match=name): entry.path(name)
    with pytest.warns(UserWarning, match=name): assert not entry.sound(name)
    assert name not in entry and (entry.folder / f"{name}.damaged-1").read_bytes() == bytes_now


def test_damage_after_the_first_look_is_noticed(entry):
    file = entry.path("a.bin")
    time.sleep(0.01)
    file.write_bytes(b"y" * 200)
    with pytest.raises(DamagedFile): entry.path("a.bin")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_manifest_is_named(entry, text):
    (entry.folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedFile, match="manifest.json"): entry.path("a.bin")


def test_a_file_that_nobody_wrote_is_not_trusted(entry):
    (entry.folder / "d.bin").write_bytes(b"1")
    with pytest.raises(DamagedFile, match="not in the folder's manifest"): entry.path("d.bin")
    with pytest.raises(FileNotFoundError, match="e.bin"): entry.path("e.bin")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    with atomic(file) as draft: draft.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(file) as draft:
        draft.write_text("new")
        raise ZeroDivisionError
    assert file.read_text() == "old" and len(list(file.parent.iterdir())) == 1


def test_only_what_is_missing_is_computed(entry):
    asked = []

    def compute(keys):
        asked.append(sorted(keys))
        return {k: len(k) for k in keys}
    assert entry.cached("lengths.json", ["a", "bb"], compute) == {"a": 1, "bb": 2}
    assert entry.cached("lengths.json", ["bb", "ccc"], compute) == {"bb": 2, "ccc": 3}
    assert entry.cached("lengths.json", ["a", "ccc"], compute) == {"a": 1, "ccc": 3}
    assert asked == [["a", "bb"], ["ccc"]]
    assert json.loads((entry.folder / "lengths.json").read_text()) == {"a": 1, "bb": 2, "ccc": 3}


def _add(folder, i):
    entry = Entry(folder)
    for j in range(10):
        with entry.write(f"{i}-{j}.txt") as draft: draft.write_text(f"{i} {j}")


def test_several_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(tmp_path, i)) for i in range(4)]
    for w in workers: w.start()
    for w in workers: w.join()
    entry = Entry(tmp_path)
    assert len(entry.manifest()) == 40 and all(entry.sound(name) for name in entry.manifest())


def test_a_writer_that_dies_before_the_move_leaves_the_old_file(entry, monkeypatch):
    import os
    replace = os.replace

    def die_at_the_file(source, target):
        if target.name == "a.bin": raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr("os.replace", die_at_the_file)
    with pytest.raises(KeyboardInterrupt), entry.write("a.bin") as draft: draft.write_bytes(b"new")
    monkeypatch.undo()
    assert Entry(entry.folder).path("a.bin").read_bytes() == bytes(range(200))


def test_tidy_leaves_a_writer_alone(entry):
    "Its draft, and the checksum of a file that is about to be there."
    with entry.write("d.bin") as draft:
        draft.write_bytes(b"1")
        Entry(entry.folder).tidy()
    assert entry.path("d.bin").read_bytes() == b"1"
    with atomic(entry.folder / "e.bin") as draft:      # what `write` does, one step later
        draft.write_bytes(b"2")
        (entry.folder / "manifest.json").write_text(json.dumps({**entry.manifest(), "e.bin": [[1, "0"]]}))
        Entry(entry.folder).tidy()
    assert "e.bin" in entry.manifest()
