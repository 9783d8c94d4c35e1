"""Runs that are damaged, cut off, asked for twice, without room or permission, or that go wrong: what must happen."""

import errno
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

from nc_nbdev.lab.claims import Statement, load_claims, save_claims
from nc_nbdev.lab.runs import (
    Run,
    TrainingEnded,
    _train_run,
    damaged_files,
    finished_runs,
    get_run,
    get_runs,
    list_runs,
    parallel,
    plan_table,
    recipe_id,
)
from nc_nbdev.lab.settings import Settings
from nc_nbdev.lab.store import DamagedFile, Entry
from nc_nbdev.lab.studies import Measured, StudyResult, _compute, _kept, _read, _write, histories

TROUBLE = {}      # what `Points` does wrong: epoch -> function of the learner; not part of the recipe


@dataclass(frozen=True)
class Points:
    "Three noisy points in the plane and a small network."
    kind = "points"
    epochs: int = 4
    lr: float = 0.1
    noise: float = 0.5
    seed: int = 0
    measure_points: int = 3
    snapshots: int = 3
    per_class: int = 10
    log: str = ""

    def data(self):
        generator = torch.Generator().manual_seed(self.seed)
        y = torch.arange(3 * self.per_class) % 3
        x = torch.eye(3)[y][:, :2] * 4 + self.noise * torch.randn(len(y), 2, generator=generator)
        return list(zip(x, y, strict=True))

    def loaders(self, data_dir, device):
        samples = self.data()
        return {"train": DataLoader(samples, bs=30), "test": DataLoader(samples[::-1], bs=30)}

    def learner(self, data_dir, device):
        if self.log:
            with open(self.log, "a") as f: f.write(f"{self.seed}\n")
        model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3))
        dls = DataLoaders(DataLoader(self.data(), bs=10, shuffle=True), DataLoader(self.data(), bs=10), device=device)
        return Learner(dls, model, nn.functional.cross_entropy, lr=self.lr, cbs=_GoesWrong())


class _GoesWrong(Callback):
    order = 50
    def after_batch(self):
        if self.training and self.iter == 1 and self.epoch in TROUBLE: TROUBLE[self.epoch](self.learn)


@pytest.fixture(autouse=True)
def _no_trouble():
    TROUBLE.clear()
    yield
    TROUBLE.clear()


def settings(folder): return Settings(device="cpu", runs_dir=Path(folder))
def numbers(run): return run.history.drop(columns="run")
def same(run, other): pd.testing.assert_frame_equal(numbers(run), numbers(other), check_exact=True)


def folder_of(recipe, here): return Path(here.runs_dir) / recipe_id(recipe)


def fork(function, *args):
    "A process of its own, which has everything imported already; its id."
    if pid := os.fork(): return pid
    status = 1
    try:
        function(*args)
        status = 0
    except SystemExit as e: status = e.code
    except BaseException: traceback.print_exc()
    finally: os._exit(status)


def ended(pid):
    "How a process ended: its exit status, or minus the signal."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(true, seconds=60):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until: time.sleep(0.005)
    assert true(), "waited in vain"


# -- damaged files ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A finished run, one of another seed, one that was cut off after two epochs, and the result of a study."
    here = settings(tmp_path_factory.mktemp("whole"))
    get_run(Points(seed=1), here, progress=False)
    done = get_run(Points(), here, progress=False)
    done.entry.cached("probe.json", ["a", "b"], lambda keys: dict.fromkeys(keys, 1.5))
    TROUBLE[2] = lambda learn: 1 / 0
    with pytest.raises(ZeroDivisionError): get_run(Points(lr=0.2), here, progress=False)
    TROUBLE.clear()
    _write(_study(here), _result())
    return here


def _study(here): return Entry(Path(here.runs_dir) / "studies" / "dice-quick-0123456789abcdef")


def _result():
    claim = Statement("a", "", "", "", at_least=6).claim([7.1, 6.8], [3.4, 3.6])
    return StudyResult("dice", "Dice", [claim], pd.DataFrame({"value": [1.0]}), {"dots": b"a picture" * 99})


def put(file, data):
    "Other bytes in the place of a file."
    file.write_bytes(data)


def folder_instead(file): file.unlink(); file.mkdir()
def flipped(file): b = file.read_bytes(); put(file, b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:])


def another(file):
    "The file of this name of another run."
    other = next(p for p in file.parents[1].glob(f"*/{file.name}") if p.parent != file.parent)
    shutil.copy(other, file)


def with_time(file):
    "Changed, with the old time."
    stat = file.stat()
    flipped(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


KINDS = {"truncated": lambda f: put(f, f.read_bytes()[:-1]),
         "halved": lambda f: put(f, f.read_bytes()[:f.stat().st_size // 2]),
         "empty": lambda f: put(f, b""), "missing": lambda f: f.unlink(), "flipped bit": flipped,
         "longer": lambda f: put(f, f.read_bytes() + b"\0"), "zeros": lambda f: put(f, bytes(f.stat().st_size)),
         "flipped bit, old time": with_time, "a folder": folder_instead}
FEW = ("truncated", "missing", "flipped bit")
DAMAGES = [(Points(), name, kind) for name in ("history.parquet", "weights-0004.pth", "recipe.json") for kind in KINDS]
DAMAGES += [(Points(), "manifest.json", kind) for kind in KINDS if "flipped" not in kind]
DAMAGES += [(Points(), "weights-0000.pth", kind) for kind in FEW]
DAMAGES += [(Points(), name, "of another run") for name in ("history.parquet", "weights-0004.pth", "manifest.json")]
DAMAGES += [(Points(lr=0.2), "checkpoint.pth", kind) for kind in KINDS]
DAMAGES += [(Points(lr=0.2), name, kind) for name in ("weights-0000.pth", "recipe.json") for kind in FEW]


@pytest.mark.parametrize("recipe, name, kind", DAMAGES, ids=[f"{r.lr} {n} {k}" for r, n, k in DAMAGES])
def test_a_damaged_file_of_a_run_is_set_aside_and_the_run_is_the_same(whole, tmp_path, recipe, name, kind, reference):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here = settings(tmp_path / "runs")
    file = folder_of(recipe, here) / name
    if recipe == Points(): get_run(recipe, here, progress=False)            # was found whole before
    (another if kind == "of another run" else KINDS[kind])(file)
    damaged = file.read_bytes() if file.is_file() else None
    if name != "checkpoint.pth" or kind == "missing":
        wrong = damaged_files(here.runs_dir, progress=False)
        assert not wrong.empty == (name != "checkpoint.pth")
        assert set(wrong.folder) <= {file.parent.name}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = get_run(recipe, here, progress=False)
        same(again, reference[recipe])
        assert torch.equal(again.model(0)[0].weight, reference[recipe].model(0)[0].weight)
    kept = [p for p in file.parent.glob("*.damaged-*") if p.name.startswith(name)]
    if kind != "missing": assert any(name in str(w.message) for w in said) and kept
    if damaged is not None: assert damaged in [p.read_bytes() for p in kept]
    assert damaged_files(here.runs_dir, progress=False).empty
    assert get_run(recipe, here, progress=False).folder == again.folder


@pytest.fixture(scope="module")
def reference(whole, tmp_path_factory):
    "The runs of undamaged folders that were never cut off."
    here = settings(tmp_path_factory.mktemp("reference"))
    return {r: get_run(r, here, progress=False) for r in (Points(), Points(lr=0.2))}


@pytest.mark.parametrize("name", ["result.json", "claims.json", "history.parquet", "dots.png", "manifest.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_result_of_a_study_is_computed_again(whole, tmp_path, name, kind):
    entry = Entry(tmp_path / "studies" / _study(whole).folder.name)
    shutil.copytree(_study(whole).folder, entry.folder)
    assert _kept(entry) and _read(entry).claims == _result().claims
    file = entry.folder / name
    KINDS[kind](file)
    assert not damaged_files(tmp_path, progress=False).empty
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not _kept(Entry(entry.folder))
    assert kind == "missing" or any(name in str(w.message) for w in said)
    _write(entry, _result())
    assert _kept(Entry(entry.folder)) and damaged_files(tmp_path, progress=False).empty


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_answers_are_computed_again(whole, tmp_path, kind):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    entry = Entry(folder_of(Points(), settings(tmp_path / "runs")))
    KINDS[kind](entry.folder / "probe.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert entry.cached("probe.json", ["a"], lambda keys: dict.fromkeys(keys, 2.5)) == {"a": 2.5}
    assert Entry(entry.folder).read_json("probe.json") == {"a": 2.5}


def test_a_changed_checksum_is_a_changed_file(whole, tmp_path, reference):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here = settings(tmp_path / "runs")
    entry = Entry(folder_of(Points(), here))
    digest = entry.manifest()["weights-0004.pth"][0][1]
    file = entry.folder / "manifest.json"
    file.write_text(file.read_text().replace(digest, digest[::-1]))
    with pytest.warns(UserWarning, match="weights-0004.pth"): same(get_run(Points(), here, False), reference[Points()])


def _rewrite(entry, **changes): entry.write_json("recipe.json", entry.read_json("recipe.json") | changes)


REFUSED = {
    "another recipe": (lambda e: _rewrite(e, lr=0.3, changed={"lr": 0.3}), "holds another recipe"),
    "another default": (lambda e: _rewrite(e, noise=0.7), "holds another recipe"),
    "an older format": (lambda e: _rewrite(e, format=1), "written in format 1"),
    "no format": (lambda e: e.write_json("recipe.json", {}), "written in format None"),
}


@pytest.mark.parametrize("change, said", REFUSED.values(), ids=REFUSED)
def test_a_folder_of_something_else_is_refused_and_left_alone(whole, tmp_path, change, said):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here = settings(tmp_path / "runs")
    change(Entry(folder_of(Points(), here)))
    content = lambda: {p: p.read_bytes() for p in folder_of(Points(), here).glob("[!.]*")}
    before = content()
    with pytest.raises(DamagedFile, match=f"{recipe_id(Points())}.*{said}"): get_run(Points(), here, progress=False)
    assert before == content()


MISFITS = {
    "of another network": lambda state: state | {"model": {"0.weight": torch.zeros(1)}},
    "without weights": lambda state: {k: v for k, v in state.items() if k != "model"},
    "a list": lambda state: [1, 2],
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_set_aside(whole, tmp_path, change, reference):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here, recipe = settings(tmp_path / "runs"), Points(lr=0.2)
    entry = Entry(folder_of(recipe, here))
    entry.write_tensors("checkpoint.pth", change(entry.read_tensors("checkpoint.pth")))
    with pytest.warns(UserWarning, match="(?s)cannot be used.*starts anew"): run = get_run(recipe, here, progress=False)
    same(run, reference[recipe])
    assert (run.folder / "checkpoint.pth.damaged-1").exists()


def test_lists_of_runs_survive_damage(whole, tmp_path):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here = settings(tmp_path / "runs")
    (folder_of(Points(), here) / "recipe.json").write_bytes(b"{")
    (folder_of(Points(seed=1), here) / "seconds.json").write_bytes(b"")
    assert "damaged" in set(list_runs(here.runs_dir).format)
    with pytest.warns(UserWarning, match="recipe.json"): found = finished_runs(Points, here)
    assert [r.recipe.seed for r in found] == [1]
    with pytest.warns(UserWarning, match="seconds.json"): table = plan_table([Points(), Points(seed=1)], here)
    assert table.state.tolist() == ["finished", "finished"]


def test_weights_that_lost_a_bit_on_the_disk_are_not_used(whole, tmp_path, reference, monkeypatch):
    "Size and times are those of the whole file, so only the reader of the weights can notice."
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here = settings(tmp_path / "runs")
    run = get_run(Points(), here, progress=False)
    note, file = run.folder / ".whole.json", run.folder / "weights-0004.pth"
    old, stat = note.read_text(), file.stat()
    flipped(file)
    new = file.stat()
    for a, b in (("st_mtime_ns", "st_mtime_ns"), ("st_ctime_ns", "st_ctime_ns")):
        old = old.replace(str(getattr(stat, a)), str(getattr(new, b)))
    note.write_text(old)
    again = get_run(Points(), here, progress=False)
    with pytest.warns(UserWarning), pytest.raises(DamagedFile, match="weights-0004"): again.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = get_run(Points(), here, progress=False)
    assert torch.equal(again.model()[0].weight, reference[Points()].model()[0].weight)


@pytest.mark.parametrize("text", ["", "[", '{"a": 1}', "\0\0"])
def test_a_damaged_claims_file_is_named(tmp_path, text):
    file = tmp_path / "claims.json"
    save_claims(_result().claims, file)
    file.write_text(text)
    with pytest.raises(ValueError, match="claims.json: damaged"): load_claims(file)


# -- cut off ---------------------------------------------------------------------------------------------------------

def _train(folder, seconds=0.0): return _train_run(Run(Points(), Path(folder)), "cpu", False, seconds)


def _train_until(folder, cpu_seconds):
    "Train, and be killed by the kernel after so many seconds of CPU time."
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    _train(folder)


def _train_to_event(folder, event):
    "Train, and be killed within the n-th write, sync or rename of a file."
    seen = [0]

    def counted(function, half=None):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] == event:
                if half: half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    bytes_, text, parquet = Path.write_bytes, Path.write_text, pd.DataFrame.to_parquet
    Path.write_bytes = counted(bytes_, lambda path, data: bytes_(path, bytes(data)[:len(data) // 2]))
    Path.write_text = counted(text, lambda path, data: text(path, data[:len(data) // 2]))
    pd.DataFrame.to_parquet = counted(parquet, lambda table, path, **k: bytes_(path, b"PAR1half"))
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    _train(folder)


def _finish(folder, reference):
    "The run goes on, an hour later, and nothing is left of the one that was killed."
    for draft in Path(folder).glob(".*.draft"): os.utime(draft, (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")                          # a kill damages nothing
        _train(folder)
    same(Run(Points(), Path(folder)), reference[Points()])
    assert damaged_files(folder, progress=False).empty
    assert not list(Path(folder).glob(".*.draft")) and not list(Path(folder).glob("*damaged*"))


def test_killed_at_twenty_random_moments(tmp_path, reference):
    _train(tmp_path / "warm")
    start = time.process_time()
    _train(tmp_path / "uncut")
    uncut, moments = time.process_time() - start, random.Random(0)
    killed = 0
    for i in range(20):
        folder = tmp_path / str(i)
        killed += ended(fork(_train_until, folder, moments.uniform(0.02, 1) * uncut)) == -signal.SIGPROF
        _finish(folder, reference)
    assert killed > 5, "most were killed while they trained"


@pytest.mark.parametrize("event", random.Random(1).sample(range(1, 60), 16))
def test_killed_within_a_write(tmp_path, reference, event):
    assert ended(fork(_train_to_event, tmp_path / "run", event)) == -signal.SIGKILL
    _finish(tmp_path / "run", reference)


def test_killed_again_and_again(tmp_path, reference):
    "Each time a little later, in the same folder."
    for event in range(3, 45, 6): fork_ended = ended(fork(_train_to_event, tmp_path / "run", event))
    assert fork_ended in (0, -signal.SIGKILL)
    _finish(tmp_path / "run", reference)


def test_stopped_by_hand_says_what_is_kept_and_goes_on(tmp_path, reference, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a process in the background may ignore it
    TROUBLE[2] = lambda learn: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): get_run(Points(), settings(tmp_path), progress=False)
    assert "2 of 4 epochs are kept. Ask for the run again" in capsys.readouterr().out
    TROUBLE.clear()
    run = get_run(Points(), settings(tmp_path), progress=False)
    same(run, reference[Points()])


@pytest.mark.parametrize("n_jobs", [None, 1])
def test_sigterm_saves_and_ends_with_143(tmp_path, reference, n_jobs):
    here, recipes = settings(tmp_path), [Points(), Points(seed=3)][:1 if n_jobs is None else 2]
    TROUBLE[3] = lambda learn: os.kill(os.getpid(), signal.SIGTERM)
    assert ended(fork(lambda: get_runs(recipes, here, False, n_jobs))) == 128 + signal.SIGTERM
    assert Entry(folder_of(Points(), here)).read_tensors("checkpoint.pth")["epoch"] == 3
    TROUBLE.clear()
    same(get_run(Points(), here, progress=False), reference[Points()])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -- two at once -----------------------------------------------------------------------------------------------------

def test_eight_processes_train_each_of_twenty_runs_once(tmp_path):
    here, log = settings(tmp_path / "runs"), tmp_path / "log"
    recipes = [Points(seed=s, epochs=2, measure_points=2, snapshots=1, log=str(log)) for s in range(20)]

    def all_of_them(i):
        order = random.Random(i).sample(recipes, 20)
        assert [r.recipe for r in get_runs(order, here, progress=False, n_jobs=1)] == order
    assert [ended(pid) for pid in [fork(all_of_them, i) for i in range(8)]] == [0] * 8
    assert sorted(log.read_text().split(), key=int) == [str(s) for s in range(20)]
    assert list_runs(here.runs_dir).finished.sum() == 20 and damaged_files(here.runs_dir, progress=False).empty


def _hold(folder, seconds):
    with Entry(folder).lock(): (folder / "held").touch(); time.sleep(seconds)


def test_who_comes_second_waits_with_a_bar_and_then_trains(tmp_path, capsys, reference):
    folder = folder_of(Points(), settings(tmp_path))
    pid = fork(_hold, folder, 0.5)
    wait_until((folder / "held").exists)
    (folder / "held").unlink()
    run = get_run(Points(), settings(tmp_path), progress=True)
    assert ended(pid) == 0 and "another process trains it" in capsys.readouterr().out
    same(run, reference[Points()])


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    folder = folder_of(Points(), settings(tmp_path))
    pid = fork(_hold, folder, 600)
    wait_until((folder / "held").exists)
    (folder / "held").unlink()
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    start = time.monotonic()
    with Entry(folder).lock(): assert time.monotonic() - start < 5


def test_a_file_that_is_mended_by_another_process_is_not_set_aside(whole, tmp_path, monkeypatch):
    "Between the look of this process and its lock, another one wrote the file again."
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    folder = folder_of(Points(), settings(tmp_path / "runs"))
    good, lock = (folder / "probe.json").read_bytes(), Entry.lock
    (folder / "probe.json").write_bytes(b"")

    def mended_meanwhile(self, *args, **kwargs):
        (folder / "probe.json").write_bytes(good)
        return lock(self, *args, **kwargs)
    monkeypatch.setattr(Entry, "lock", mended_meanwhile)
    assert Entry(folder).sound("probe.json") and not list(folder.glob("*damaged*"))


# -- a worker that dies ----------------------------------------------------------------------------------------------

def _job(i):
    if i == 1: os._exit(9)
    return i * i


def test_a_worker_that_dies_is_named_and_the_others_go_on(monkeypatch):
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.backend import context
    get_reusable_executor().shutdown(kill_workers=True)
    monkeypatch.setattr(context, "_DEFAULT_START_METHOD", "fork")          # nothing is imported again
    done = []
    try:
        with pytest.raises(RuntimeError, match=r"squaring: 1 of 6 failed(.|\n)*\(1,\): its process died"):
            parallel([(_job, i) for i in range(6)], "squaring", progress=False, n_jobs=2)
        done = parallel([(_job, i) for i in (0, 2, 3)], "squaring", progress=False, n_jobs=2)
    finally: get_reusable_executor().shutdown(kill_workers=True)
    assert done == [0, 4, 9]


# -- no room, no permission, no rename -------------------------------------------------------------------------------

def _fails(code): raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("place, code, said", [
    ("os.fsync", errno.ENOSPC, "no room on the disk"), ("os.replace", errno.ENOSPC, "no room on the disk"),
    ("os.fsync", errno.EDQUOT, "the quota is used up"), ("os.replace", errno.EXDEV, "no rename"),
    ("os.replace", errno.ENOTSUP, "no rename"), ("os.replace", errno.EROFS, "read-only")])
def test_what_cannot_be_written_says_why(whole, tmp_path, monkeypatch, reference, place, code, said):
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    here = settings(tmp_path / "runs")
    with monkeypatch.context() as broken:
        broken.setattr(place, lambda *args: _fails(code))
        with pytest.raises(OSError, match=f"cannot be written, {said}.*stays readable") as error:
            get_run(Points(lr=0.2), here, progress=False)
        assert error.value.errno == code
        same(get_run(Points(), here, progress=False), reference[Points()])
        assert _read(_study(here)).claims and damaged_files(here.runs_dir, progress=False).empty
    same(get_run(Points(lr=0.2), here, progress=False), reference[Points(lr=0.2)])


def _on_a_small_disk(folder, source):
    "A disk of 128 KiB of our own where that is allowed, else files of at most 4 KiB. A run ends, another is read."
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.getuid()
    mounted = libc.unshare(0x00020000 | (0 if root == 0 else 0x10000000)) == 0 and libc.mount(
        b"none", os.fsencode(folder), b"tmpfs", 0, b"size=128k") == 0
    shutil.copytree(source, folder / "runs")
    here = settings(folder / "runs")
    if not mounted:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    else:
        with pytest.raises(OSError), open(folder / "full", "wb") as f:
            while True: f.write(bytes(512)), f.flush()
    with pytest.raises(OSError, match="cannot be written, (no room on the disk|too large here)"):
        get_run(Points(seed=8), here, progress=False)
    assert len(get_run(Points(), here, progress=False).history) and get_run(Points(), here, progress=False).model()
    if mounted:
        (folder / "full").unlink()
        get_run(Points(seed=8), here, progress=False)


def test_a_full_disk(whole, tmp_path):
    source = tmp_path / "source" / recipe_id(Points())
    shutil.copytree(folder_of(Points(), whole), source)
    (tmp_path / "disk").mkdir()
    assert ended(fork(_on_a_small_disk, tmp_path / "disk", source.parent)) == 0


def _as_nobody(here):
    "Finished runs and results are read; what is missing says that it cannot be written; damage cannot be set aside."
    if os.getuid() == 0: os.setgid(65534); os.setuid(65534)
    assert len(get_run(Points(), here, progress=False).history) and get_run(Points(), here, progress=False).model()
    assert _kept(_study(here)) and _read(_study(here)).claims
    assert len(damaged_files(here.runs_dir, progress=False)) == 1
    with pytest.raises(PermissionError, match="cannot be written, no permission"):
        get_run(Points(seed=8), here, progress=False)
    with pytest.warns(UserWarning, match="computed again next time"):
        found = Entry(folder_of(Points(), here)).cached("probe.json", ["c"], lambda keys: {"c": 3})
    assert found == {"c": 3}
    with pytest.raises(DamagedFile, match="cannot be set aside"): get_run(Points(seed=1), here, progress=False)


def test_a_read_only_folder(whole):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, "runs")
        shutil.copytree(whole.runs_dir, runs)
        (folder_of(Points(seed=1), settings(runs)) / "history.parquet").write_bytes(b"")
        os.chmod(folder, 0o755)
        for p in [runs, *runs.rglob("*")]: os.chmod(p, 0o555 if p.is_dir() else 0o444)
        try: assert ended(fork(_as_nobody, settings(runs))) == 0
        finally:
            for p in [runs, *runs.rglob("*")]: os.chmod(p, 0o755)


# -- training that goes wrong ----------------------------------------------------------------------------------------

def spoil(value, weights=slice(None)):
    "Put a number into weights of the last layer or of all."
    def do(learn):
        with torch.no_grad():
            for p in list(learn.model.parameters())[weights]: p.fill_(value)
    return do


def at(run, epoch, measure="nc1_trace", split="train"):
    rows = run.history[run.history.measure == measure]
    rows = rows[(rows.layer == rows.layer.iloc[-1]) & (rows.epoch == epoch) & (rows.split == split)]
    return rows.value.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_training_that_diverges_ends_and_keeps_its_history(tmp_path, value, reference):
    TROUBLE[2] = spoil(value)
    here = settings(tmp_path)
    with pytest.warns(UserWarning, match="training ended after epoch 2; epoch 3: weights are NaN or infinite"):
        run = get_run(Points(), here, progress=False)
    for epoch in (0, 1): assert at(run, epoch) == at(reference[Points()], epoch)
    assert all(pd.isna(v) for v in at(run, 4)) and len(at(run, 4)) == 1
    assert run.model(1) is not None
    with pytest.raises(TrainingEnded, match="training ended after epoch 2"): run.model()
    TROUBLE.clear()
    with pytest.warns(UserWarning, match="training ended"): again = get_run(Points(), here, progress=False)
    same(again, run)
    assert damaged_files(tmp_path, progress=False).empty


def test_features_that_die_are_nan_with_a_reason_and_training_goes_on(tmp_path, reference):
    TROUBLE[2] = spoil(-9.0, slice(0, 2))                     # every input is below: the layer gives 0
    with pytest.warns(UserWarning, match="numbers not measured.*class means coincide"):
        run = get_run(Points(noise=0.0), settings(tmp_path), progress=False)
    assert all(pd.isna(v) for v in at(run, 4)) and len(at(run, 4)) == 1 and not pd.isna(at(run, 1)).any()
    assert "class means coincide" in run.reasons["4"] and "ended" not in run.reasons
    assert at(run, 4, "accuracy")[0] <= 1 and run.model() is not None


def test_reasons_survive_a_stop(tmp_path):
    "Features die, then training is stopped: the run that goes on still knows why numbers are missing."
    here, longer = settings(tmp_path), Points(noise=0.0, epochs=6, measure_points=9)
    TROUBLE[2], TROUBLE[4] = spoil(-9.0, slice(0, 2)), lambda learn: 1 / 0
    with pytest.warns(UserWarning), pytest.raises(ZeroDivisionError): get_run(longer, here, progress=False)
    TROUBLE.clear()
    with pytest.warns(UserWarning): run = get_run(longer, here, progress=False)
    assert {"3", "4", "5", "6"} <= set(run.reasons)


def test_one_sample_a_class(tmp_path):
    run = get_run(Points(per_class=1), settings(tmp_path), progress=False)
    assert at(run, 4) == [0.0] and at(run, 4, "nc2_etf")[0] > 0 and not run.reasons


@dataclass(frozen=True)
class Lost(Points):
    "No sample of the last class in the test set, or features that are NaN from the start."
    kind = "lost"
    what: str = "class"

    def loaders(self, data_dir, device):
        samples = self.data()
        if self.what == "class": return {"train": DataLoader(samples, bs=30),
                                         "test": DataLoader([s for s in samples if s[1] < 2], bs=30)}
        return {"train": DataLoader([(x / 0, y) for x, y in samples], bs=30)}


@pytest.mark.parametrize("what, said", [("class", "test set:.*class"), ("features", "NaN or infinity")])
def test_what_cannot_be_measured_from_the_start_is_refused(tmp_path, what, said):
    with pytest.raises(ValueError, match=said): get_run(Lost(what=what), settings(tmp_path), progress=False)
    assert not list_runs(tmp_path).finished.any()


GAIN = (Statement("a", "Features collapse", "nc1_trace", "the start", at_most=1e9),
        Statement("b", "Weights are kept", "norm", "the start", at_most=1e9))


def test_claims_of_a_training_that_diverges_are_not_measured(tmp_path):
    from nc_nbdev.lab.history import curves, final

    def measured(settings, progress):
        history = histories({"points": Points()}, settings, progress)
        table = curves(history, "nc1_trace", "train")
        return Measured({"a": (final(table), table.loc[0])}, history)

    def needs_weights(settings, progress):
        get_run(Points(), settings, progress).model()
    TROUBLE[2] = lambda learn: spoil(float("nan"))(learn) if bad[0] else None
    here, bad = replace(settings(tmp_path), seeds=2), [False]
    get_run(Points(seed=1), here, progress=False)
    bad[0] = True
    with pytest.warns(UserWarning, match="training ended"):
        a, b = _compute("gain", "Gain", GAIN, measured, here, False).claims
        assert (a.verdict, b.verdict) == ("not measured", "not measured") and "number 1 of 2 is nan" in a.note
        a, b = _compute("gain", "Gain", GAIN, needs_weights, here, False).claims
    assert (a.verdict, b.verdict) == ("not measured", "not measured") and "training ended after epoch 2" in b.note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("interval", ["t", "log-t", "bootstrap", "expanded", "range"])
def test_a_claim_on_a_number_that_is_not_finite_is_not_measured(value, interval):
    for bar in (dict(at_least=0.5), dict(at_most=0.5)):
        said = Statement("a", "", "", "", interval=interval, **bar)
        for values, control in (([value] * 6, [1.0] * 6), ([1.0, 1.1, value], [0.1] * 3), ([1.0] * 3, [value] * 3)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert said.claim(values, control).verdict == "not measured"


# -- the command -----------------------------------------------------------------------------------------------------

def test_the_command_verifies(whole, tmp_path, capsys):
    from importlib import import_module
    main = import_module("nc_nbdev.reproduce").main
    shutil.copytree(whole.runs_dir, tmp_path / "runs")
    main(["--verify", "--runs", str(tmp_path / "runs")])
    said, files = capsys.readouterr().out, [f for f in (tmp_path / "runs").rglob("[!.]*") if f.is_file()]
    assert f"{len(files)} files read, no damaged files" in said
    damaged = [folder_of(Points(), settings(tmp_path / "runs")) / "weights-0001.pth", tmp_path / "runs" / "studies"
               / _study(whole).folder.name / "claims.json"]
    for file in damaged: with_time(file)
    with pytest.raises(SystemExit) as end: main(["--verify", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "2 damaged files" in said and all(str(f) in said for f in damaged)
    assert all(f.exists() for f in damaged)


def test_the_command_verifies_no_folder_that_is_missing(tmp_path, capsys):
    from importlib import import_module
    main = import_module("nc_nbdev.reproduce").main
    with pytest.raises(SystemExit) as end: main(["--verify", "--runs", str(tmp_path / "none")])
    assert end.value.code == 2 and f"{tmp_path / 'none'}: no such folder; expected" in capsys.readouterr().err
    main(["--verify", "--runs", str(tmp_path)])
    assert f"{tmp_path}: 0 files read, no damaged files" in capsys.readouterr().out
