"Features in files of every kind give the numbers of features in memory; damaged and hostile files give one line."
import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import ipc
from pyarrow import parquet as pq

import nc_nbdev as nc
from nc_nbdev.geometry.generalization import test_collapse_from_statistics as from_statistics
from nc_nbdev.geometry.measures import measure_features
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.lab import features_on_disk
from nc_nbdev.lab.features_on_disk import StoredFeatures, measure_command, measure_files, open_arrays

rng = np.random.default_rng(0)
y = np.concatenate([np.arange(4), rng.integers(0, 4, 196)])
H = (rng.normal(size=(4, 6))[y] + 0.3 * rng.normal(size=(200, 6))).astype(np.float32)
W, b = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=4).astype(np.float32)


LISTS = pa.list_(pa.float32())


def table(H, y, kind=LISTS): return pa.table({"features": pa.array(list(H), kind), "labels": y})


def as_arrow(path, table, new):
    with new(path, table.schema) as writer: writer.write_table(table, max_chunksize=70)


def safetensors(path, H, y):
    from safetensors.numpy import save_file
    save_file({"labels": y, "features": np.ascontiguousarray(H)}, path)


WRITERS = {
    "a.npz": lambda path, H, y: np.savez(path, features=H, labels=y),
    "compressed.npz": lambda path, H, y: np.savez_compressed(path, embedding=H, label=y.astype(np.uint8)),
    "columns.npz": lambda path, H, y: np.savez(path, x=np.asfortranarray(H), y=y, W=W, ids=y[:3]),
    "big.npz": lambda path, H, y: np.savez(path, features=H.astype(">f8"), labels=y.astype(">i4")),
    "a.pt": lambda path, H, y: torch.save({"features": torch.tensor(H), "labels": torch.tensor(y)}, path),
    "pair.pth": lambda path, H, y: torch.save((torch.tensor(H), torch.tensor(y)), path),
    "old.pt": lambda path, H, y: torch.save({"H": torch.tensor(H), "y": torch.tensor(y)}, path,
                                            _use_new_zipfile_serialization=False),
    "a.safetensors": safetensors,
    "a.parquet": lambda path, H, y: pq.write_table(table(H, y), path, row_group_size=64),
    "fixed.parquet": lambda path, H, y: pq.write_table(table(H, y, pa.list_(pa.float64(), 6)), path),
    "a.arrow": lambda path, H, y: as_arrow(path, table(H, y), ipc.new_file),
    "stream.arrow": lambda path, H, y: as_arrow(path, table(H, y, pa.large_list(pa.float32())), ipc.new_stream),
    "a.feather": lambda path, H, y: __import__("pyarrow.feather").feather.write_feather(table(H, y), str(path))}
NAMES = {"columns.npz": dict(features="x")}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(name, tmp_path):
    WRITERS[name](tmp_path / name, H, y)
    stored = StoredFeatures(tmp_path / name, batch_size=37, **NAMES.get(name, {}))
    parts = list(stored)
    assert max(len(h) for h, _ in parts) <= 37 and all(len(h) == len(c) for h, c in parts)
    assert torch.equal(torch.cat([h for h, _ in parts]).float(), torch.tensor(H))
    assert torch.equal(torch.cat([c for _, c in parts]), torch.tensor(y))
    assert torch.equal(torch.cat([h for h, _ in stored]), torch.cat([h for h, _ in parts]))      # once more
    found = measure_files(tmp_path / name, **NAMES.get(name, {})).measures["train"]["features"].to_dict()
    direct = measure_features(torch.tensor(H), torch.tensor(y), num_classes=4).to_dict()
    for measure, value in direct.items(): assert found[measure] == (value and pytest.approx(value, rel=1e-5)), measure


def test_parts_of_a_data_set_are_not_paired(tmp_path):
    parts = [tmp_path / f"train-{i}.npz" for i in (0, 1)]
    for i, path in enumerate(parts): np.savez(path, features=H[i::2], labels=y[i::2])
    with pytest.raises(ValueError, match="-0.npz and .*-1.npz: each holds .* join parts"): measure_files(parts)
    np.savez(tmp_path / "ids.npz", features=H, ids=np.arange(200))
    np.savez(tmp_path / "out.npz", logits=H[:, :4], labels=y)
    files = [tmp_path / "ids.npz", tmp_path / "out.npz"]
    with pytest.raises(ValueError, match="--labels NAME"): measure_files(files)
    assert torch.equal(StoredFeatures(files, labels="labels").labels, torch.tensor(y))


@pytest.mark.parametrize("arrays, name", [
    (dict(features=H[:, None], logits=H[:, :4], labels=y), "features"),
    (dict(features=H, index=np.arange(200), y=y.astype(float)), "y"),
    (dict(features=H, split_id=y % 2, label=np.array(["cat", "dog", "emu", "fox"])[y]), "label")])
def test_another_array_is_not_taken_for_the_named_one(arrays, name, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"{name!r} is not such an array; it holds"): measure_files(tmp_path / "a.npz")
    other = {"features": dict(features="logits"), "y": dict(labels="index"), "label": dict(labels="split_id")}[name]
    assert len(StoredFeatures(tmp_path / "a.npz", **other).labels) == 200


def test_two_files_and_a_head(tmp_path):
    for name, array in dict(H=H, y=y, W=W, b=b).items(): np.save(tmp_path / f"{name}.npy", array)
    files = lambda *names: [tmp_path / f"{name}.npy" for name in names]
    found = measure_files(files("H", "y"), head=files("W", "b"))
    direct = measure_features(torch.tensor(H), torch.tensor(y), num_classes=4, head=(torch.tensor(W), torch.tensor(b)))
    for measure, value in direct.to_dict().items():
        assert found.measures["train"]["features"].to_dict()[measure] == (value and pytest.approx(value, rel=1e-5))
    right = (torch.tensor(H) @ torch.tensor(W).T + torch.tensor(b)).argmax(1) == torch.tensor(y)
    assert found.accuracy["train"] == pytest.approx(right.double().mean().item())
    assert measure_files(files("H", "y"), head=files("W")).measures["train"]["features"].nc3_bias is not None


def test_against_a_reference(tmp_path):
    test = H[:80] + 1
    np.savez(tmp_path / "train.npz", features=H, labels=y)
    np.savez(tmp_path / "test.npz", features=test, labels=y[:80])
    report = measure_files(tmp_path / "test.npz", tmp_path / "train.npz")
    stats = [ClassStatistics.from_features(torch.tensor(h), torch.tensor(c), 4) for h, c in ((H, y), (test, y[:80]))]
    direct = from_statistics(*stats)
    assert report.collapse["test"]["features"].strong == pytest.approx(direct.strong, rel=1e-5)
    near = measure_features(torch.tensor(test), torch.tensor(y[:80]), num_classes=4, reference=stats[0]).ncc_accuracy
    assert report.measures["test"]["features"].ncc_accuracy == pytest.approx(near)


def test_command(tmp_path, capsys):
    for name in ("a.npz", "a.pt"): WRITERS[name](tmp_path / name, H, y)
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    arguments = [x for kind, path in out.items() for x in (f"--{kind}", str(path))]
    measure_command([str(tmp_path / "a.npz"), "--reference", str(tmp_path / "a.pt"), *arguments])
    assert "nc1_trace" in capsys.readouterr().out
    value = measure_files(tmp_path / "a.npz").measures["train"]["features"].nc1_trace
    assert json.loads(out["json"].read_text())["measures"]["test"]["nc1_trace"] == pytest.approx(value)
    assert out["csv"].read_text().startswith("split,layer,measure,value")
    assert out["html"].read_text().startswith("<!doctype html>")


def fails(capsys, *arguments):
    "What the command says, in one line, when it ends with exit code 2."
    with pytest.raises(SystemExit) as caught: measure_command([str(a) for a in arguments])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and said.startswith("nc-measure: ") and "\n" not in said
    return said


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_is_run(tmp_path, capsys):
    ran = tmp_path / "ran"
    torch.save({"features": torch.tensor(H), "labels": Evil(ran)}, tmp_path / "new.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(ran)))
    np.save(tmp_path / "object.npy", np.array([Evil(ran)], dtype=object))
    np.savez(tmp_path / "object.npz", features=np.array([Evil(ran)], dtype=object), labels=y[:1])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Evil(ran)))
    for name in ("new.pt", "plain.pt", "object.npy", "object.npz", "pickle.npz"): fails(capsys, tmp_path / name)
    for name in ("new.pt", "plain.pt"): assert "more than tensors" in fails(capsys, tmp_path / name), name
    assert not ran.exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_damaged_files(name, damage, tmp_path, capsys):
    WRITERS[name](path := tmp_path / name, H, y)
    whole = path.read_bytes()
    noise = bytes(rng.integers(0, 256, len(whole) // 2, dtype=np.uint8))
    path.write_bytes({"half": whole[:len(whole) // 2], "empty": b"", "noise": noise}[damage])
    assert str(path) in fails(capsys, path) or name == "stream.arrow"


def test_a_header_that_lies(tmp_path, capsys):
    "More rows than there are bytes."
    with zipfile.ZipFile(tmp_path / "long.npz", "w") as archive:
        for name, array in dict(features=H, labels=y).items():
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": (10**12, *array.shape[1:])}
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.write(array.tobytes())
    assert "long.npz" in fails(capsys, tmp_path / "long.npz")


@pytest.mark.parametrize("arrays, said", [
    (dict(features=H, labels=y + 1), "no samples"), (dict(features=H, labels=y - 1), "labels from -1"),
    (dict(features=H, labels=y[:-1]), "200 rows of features, 199 labels"), (dict(features=H), "array of labels"),
    (dict(a=H, b=H, labels=y), "one array of features"), (dict(features=H[:, :, None], labels=y), "(200, 6, 1)"),
    (dict(features=H, labels=y.astype(float)), "array of labels"), (dict(labels=y), "array of features"),
    (dict(features=H[:0], labels=y[:0]), "one row at least"), (dict(features=H * np.nan, labels=y), "NaN"),
    (dict(features=H, labels=np.where(y == 3, 10**15, y)), "every class needs"),
    (dict(features=H.astype(complex), labels=y), "array of features")])
def test_arrays_that_cannot_be_measured(arrays, said, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    assert said in fails(capsys, tmp_path / "a.npz")


def test_other_mistakes(tmp_path, capsys):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    np.savez(tmp_path / "short.npz", features=H[:, :5], labels=y)
    pq.write_table(pa.table({"features": [[1., 2.], [3.]], "labels": [0, 1]}), tmp_path / "ragged.parquet")
    pq.write_table(pa.table({"features": [[1., 2.], None], "labels": [0, 1]}), tmp_path / "null.parquet")
    assert "lists of 2 numbers" in fails(capsys, tmp_path / "ragged.parquet")
    assert "lists of 2 numbers" in fails(capsys, tmp_path / "null.parquet")
    assert "there is no such file" in fails(capsys, tmp_path / "b.npz")
    assert "ends in one of" in fails(capsys, tmp_path / "a.csv")
    assert "in the reference of 5" in fails(capsys, tmp_path / "a.npz", "--reference", tmp_path / "short.npz")
    assert "expected one weight (4, 6)" in fails(capsys, tmp_path / "a.npz", "--head", tmp_path / "short.npz")
    fails(capsys, tmp_path / "a.npz", "--csv", tmp_path / "no" / "where.csv")


def test_what_is_in_a_file_is_said(tmp_path, capsys):
    path = lambda name: tmp_path / name
    np.save(path("h.npy"), H)
    np.save(path("y.npy"), y + 1)
    np.save(path("rows.npy"), np.array([H[0], H[1, :2]], dtype=object))
    torch.save({"epoch": 3, "train": {"features": torch.tensor(H), "labels": torch.tensor(y)}}, path("nested.pt"))
    for name, write in (("null.parquet", pq.write_table), ("null.arrow", lambda t, p: as_arrow(p, t, ipc.new_file))):
        write(table(H[:3], pa.array([0, None, 1])), path(name))
        assert f"{name}: column 'labels': some rows have no value (null); expected" in fails(capsys, path(name))
    said = fails(capsys, path("h.npy"), path("y.npy"), "--num-classes", 4)
    assert "y.npy: labels from 1 to 4: expected 0..3" in said and "h.npy" not in said
    assert "y.npy: 1 of 5 classes have no samples (0)" in fails(capsys, path("h.npy"), path("y.npy"))
    assert "it holds Python objects" in (said := fails(capsys, path("rows.npy"), path("y.npy"))) and "np.stack" in said
    assert "it holds epoch (a int), train (a dict): expected tensors by name; save" in fails(capsys, path("nested.pt"))


@pytest.mark.parametrize("new", [ipc.new_file, ipc.new_stream])
def test_the_width_of_a_table_is_that_of_its_first_list(new, tmp_path):
    as_arrow(tmp_path / "a.arrow", table([None, *H], list(range(201))), new)
    assert open_arrays(tmp_path / "a.arrow")["features"].shape == (201, 6)


def test_reading_is_bounded(tmp_path):
    "A compressed file of 200 MB is read with far less memory."
    with zipfile.ZipFile(tmp_path / "large.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        header = {"descr": "<f4", "fortran_order": False, "shape": (100_000, 500)}
        with archive.open("features.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(100): file.write(np.full((1000, 500), i % 7, np.float32).tobytes())
        with archive.open("labels.npy", "w") as file: np.save(file, np.arange(100_000) // 1000 % 7)
    code = ("import resource, sys; from nc_nbdev.lab.features_on_disk import StoredFeatures as S\n"
            "s = S(sys.argv[1]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "print(sum(len(h) for h, _ in s), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)")
    command = [sys.executable, "-c", code, str(tmp_path / "large.npz")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, megabytes = map(int, run.stdout.split())
    assert rows == 100_000 and megabytes < 100


def test_arrays_are_not_read_when_opened(tmp_path):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    assert {n: (a.shape, a.kind) for n, a in open_arrays(tmp_path / "a.npz").items()} == {
        "features": ((200, 6), "f"), "labels": ((200,), "i")}


fc, bn = {"fc.weight": W, "fc.bias": b}, {"bn.weight": b + 1, "bn.bias": b + 2}
HEADS = [(dict(weight=W, bias=b, bn_mean=b + 1), b), (bn | fc, b), (bn | {"x.weight": W[:, :5]} | fc, b),
         (dict(weight=W, bias=np.arange(4)), np.arange(4)), (dict(W=W, b=b[:, None], other=b), b),
         (dict(kernel=W, bias=b[None], label=y[:4]), b), ({"head": W, "head_bias": b, "scale": b}, b),
         ({"0": W, "1": b}, b), (dict(weight=W), None), ({"fc.weight": W, "bn.weight": W[0], "bn.bias": W[0]}, None)]


@pytest.mark.parametrize("arrays, bias", HEADS)
@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_the_bias_of_a_head(arrays, bias, kind, tmp_path):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    if kind == "npz": np.savez(tmp_path / "head.npz", **arrays)
    else: torch.save({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / "head.pt")
    found = measure_files(tmp_path / "a.npz", head=tmp_path / f"head.{kind}").accuracy["train"]
    right = (torch.tensor(H) @ torch.tensor(W).T + torch.tensor(0 if bias is None else bias)).argmax(1)
    assert found == pytest.approx((right == torch.tensor(y)).double().mean().item())


@pytest.mark.parametrize("arrays, said", [
    (dict(a=W, b=W), "the head holds a (4, 6) f, b (4, 6) f; expected one weight (4, 6)"),
    (dict(a=W[:, :5], b=W[:3]), "the head holds a (4, 5) f, b (3, 6) f; expected one weight (4, 6)"),
    (dict(weight=W.T, bias=b), "transpose a weight (6, 4)"), (dict(bias=b), "the head holds bias (4,) f; expected one"),
    ({"fc.weight": W} | bn, "bn.weight (4,) f, bn.bias (4,) f; expected one bias (4,) that is named after 'fc.weight'"),
    (dict(weight=W, count=y[:4]), "count (4,) i; expected one bias"), (dict(weight=W, bias=b, b=b), "one bias"),
    (dict(weight=W, bias=b[:3]), "bias (3,) f; expected (4,)"), (dict(W=W, c=W[0]), "c (6,) f; expected (4,)"),
    (dict(weight=W, bias=b > 0), "bias (4,) b; expected (4,)")])
def test_heads_that_are_not_clear(arrays, said, tmp_path, capsys):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    np.savez(tmp_path / "head.npz", **arrays)
    said_first = fails(capsys, tmp_path / "a.npz", "--head", tmp_path / "head.npz")
    assert said in said_first and "head.npz: " in said_first and "features," not in said_first


def test_heads_in_two_files(tmp_path, capsys):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    (tmp_path / "more").mkdir()
    for name, array in {"W": W, "b": np.arange(4), "more/W": b}.items(): np.save(tmp_path / f"{name}.npy", array)
    files = lambda *names: [tmp_path / f"{name}.npy" for name in names]
    right = (H @ W.T + np.arange(4)).argmax(1) == y
    assert measure_files(tmp_path / "a.npz", head=files("W", "b")).accuracy["train"] == pytest.approx(right.mean())
    assert "two arrays 'W'" in fails(capsys, tmp_path / "a.npz", "--head", *files("W", "more/W"))


@pytest.mark.parametrize("name", ["a.npz", "a.arrow"])
def test_an_error_names_the_row_of_the_file(name, tmp_path, capsys):
    many = H.repeat(45, 0)
    many[8500, 2] = np.nan
    WRITERS[name](tmp_path / name, many, y.repeat(45))
    WRITERS["a.npz"](tmp_path / "train.npz", H, y)
    said = fails(capsys, tmp_path / name, "--reference", tmp_path / "train.npz")
    assert f"{name}: row 8500 of the 9000 rows 0..8999 holds NaN" in said


def test_a_class_without_samples(tmp_path, capsys):
    "What to do is said in words of the command, and the file is named."
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    WRITERS["a.npz"](tmp_path / "less.npz", H[y != 2], y[y != 2])
    for files in (["less.npz", "--reference", "a.npz"], ["a.npz", "--reference", "less.npz"], ["less.npz"]):
        said = fails(capsys, *(tmp_path / f if "." in f else f for f in files))
        assert "less.npz: 1 of 4 classes have no samples (2)" in said and "absent=" not in said and "from 0" in said


@pytest.mark.parametrize("K", [0, 1, -3])
def test_too_few_classes(K, tmp_path, capsys):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    assert f"--num-classes) is {K}: expected a whole number" in fails(capsys, tmp_path / "a.npz", "--num-classes", K)


@pytest.mark.parametrize("head", [True, False])
def test_classes_without_samples_are_left_out_as_in_memory(tmp_path, head):
    "The train set lacks class 3, the test set lacks 1: the numbers are those of `measure` on the same features."
    train, test = y != 3, y != 1
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(6, 4))
    model[1].load_state_dict(dict(weight=torch.tensor(W), bias=torch.tensor(b)))
    for name, rows in (("train", train), ("test", test)): np.savez(tmp_path / name, features=H[rows], labels=y[rows])
    np.savez(tmp_path / "head.npz", weight=W, bias=b)
    paths = tmp_path / "test.npz", tmp_path / "train.npz"
    with pytest.raises(ValueError, match="or leave them out: --absent"): measure_files(*paths)
    with pytest.raises(ValueError, match="absent='no': expected 'error' or"): measure_files(*paths, absent="no")
    report = measure_files(*paths, head=tmp_path / "head.npz" if head else None, absent="leave out")
    batches = [[(torch.tensor(H[rows]), torch.tensor(y[rows]))] for rows in (train, test)]
    memory = nc.measure(model, *batches, layers="0", absent="leave out", num_classes=4, keep="all",
                     head="1" if head else None)
    for split in ("train", "test"):
        found, expected = (r.measures[split][layer].to_dict() for r, layer in ((report, "features"), (memory, "0")))
        assert found["ncc_accuracy"] is not None and (found["nc4_disagreement"] is not None) == head
        assert found == {k: v if v is None else pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in expected.items()}
    assert report.collapse["test"]["features"].strong == pytest.approx(memory.collapse["test"]["0"].strong, rel=1e-5)
    assert [n for n in report.notes if "samples" in n] == [n for n in memory.notes if "samples" in n] != []


def test_nothing_to_leave_out_changes_nothing(tmp_path):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    whole, same = (measure_files(tmp_path / "a.npz", absent=absent) for absent in ("error", "leave out"))
    assert whole.frame.equals(same.frame) and whole.notes == same.notes == ()
    np.savez(tmp_path / "one.npz", features=H, labels=0 * y)
    with pytest.raises(ValueError, match="all 200 labels are 0: expected two classes"):
        measure_files(tmp_path / "one.npz", absent="leave out")


def test_no_result_is_lost(tmp_path, capsys, monkeypatch):
    "A folder that is not there is seen before anything is read; what fails later leaves the report printed."
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    with monkeypatch.context() as m:
        m.setattr(features_on_disk, "measure_files", None)
        for kind in ("json", "csv", "html"):
            said = fails(capsys, tmp_path / "a.npz", f"--{kind}", tmp_path / "no" / "x")
            assert f"--{kind} " in said and f"there is no folder {tmp_path / 'no'}; make it first" in said
            assert "this is a folder" in fails(capsys, tmp_path / "a.npz", f"--{kind}", tmp_path)
    monkeypatch.setattr(features_on_disk.Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(SystemExit): measure_command([str(tmp_path / "a.npz"), "--json", str(tmp_path / "x.json")])
    assert "NC1" in capsys.readouterr().out


def test_json_has_what_a_reader_needs(tmp_path):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    measure_command([str(tmp_path / "a.npz"), "--json", str(tmp_path / "a.json")])
    content, report = json.loads((tmp_path / "a.json").read_text()), measure_files(tmp_path / "a.npz")
    pd.testing.assert_frame_equal(pd.DataFrame(content["frame"]), report.frame)
    assert content["reasons"] == {"train": report.measures["train"]["features"].reasons}
    assert "nc3_duality" in content["reasons"]["train"]


@pytest.mark.parametrize("call, says", [
    (lambda p: StoredFeatures(p, batch_size=0), "batch_size is 0: expected a whole number of rows"),
    (lambda p: StoredFeatures(p, batch_size=-1), "batch_size is -1"),
    (lambda p: StoredFeatures(p, batch_size=2.5), "batch_size is 2.5"),
    (lambda p: measure_files([]), "0 files: expected features and labels in one file or in two"),
    (lambda p: measure_files(None), "0 files"),
    (lambda p: StoredFeatures(p, features="foo"), "a.npz: 'foo' is not there; it holds features"),
    (lambda p: StoredFeatures(p, features="labels"), "a.npz: 'labels' is not such an array; it holds features"),
    (lambda p: StoredFeatures(p, labels="foo"), "'foo' is not there; .* --labels NAME"),
])
def test_wrong_calls(tmp_path, call, says):
    WRITERS["a.npz"](tmp_path / "a.npz", H, y)
    with pytest.raises(ValueError, match=says): call(tmp_path / "a.npz")
