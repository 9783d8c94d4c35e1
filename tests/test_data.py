"Data sets in memory, loading from files, and the order of batches."
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nc_nbdev.vision.data import ImageData
from nc_nbdev.vision.loaders import TensorLoader, crop_flip, loaders
from nc_nbdev.vision.recipes import ImageRecipe
from nc_nbdev.vision.sources import dataset_names, load_dataset, templates
from nc_nbdev.vision.training import make_learner


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def synthetic(n_train=60, n_test=20, K=4, size=8, channels=1):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n_train + n_test, channels, size, size), generator=g, dtype=torch.uint8)
    y = torch.arange(n_train + n_test) % K
    return ImageData("synthetic", x[:n_train], y[:n_train], x[n_train:], y[n_train:], tuple("abcdefghij"[:K]))


def image_folder(root, size=8, count=3, classes=("cat", "dog"), mode="RGB", suffix="png"):
    rng = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "test"):
        for c in classes:
            (root / split / c).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                a = rng.integers(0, 256, (size, size, 3) if mode == "RGB" else (size, size), dtype=np.uint8)
                Image.fromarray(a).save(root / split / c / f"{i}.{suffix}")
                pixels[split, c, i] = a
    return pixels


def archive_of(folder, path, prefix=""):
    mode = "w:" + path.name.rsplit(".", 1)[-1].replace("tgz", "gz")
    with tarfile.open(path, mode) as tar: tar.add(folder, arcname=prefix or ".")


# -- importing ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", ["data", "sources", "loaders", "models"])
def test_import_is_cheap(module):
    heavy = ("fastai", "torchvision", "sklearn", "PIL", "matplotlib")
    code = f"import sys, nc_nbdev.vision.{module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# -- the data set ------------------------------------------------------------------------------------------------

def test_every_digit_once_whatever_the_split(digits):
    from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    key = lambda x, y: sorted((tuple(map(int, row)), int(c)) for row, c in zip(np.rint(np.asarray(x)), y, strict=True))
    for data in (digits, load_dataset("digits", seed=5)):
        ours = torch.cat([data.train_images, data.test_images]).flatten(1).double() * 16 / 255
        assert key(ours, torch.cat([data.train_labels, data.test_labels])) == key(pixels, labels)
        share = data.test_labels.bincount() / (data.test_labels.bincount() + data.train_labels.bincount())
        assert (share - 0.2).abs().max() < 0.01                     # stratified
    again = load_dataset("digits", seed=5)
    assert torch.equal(data.test_images, again.test_images) and not torch.equal(data.test_images, digits.test_images)


def test_templates_are_separable_without_noise_and_drawn_by_the_seed():
    clean, noisy = load_dataset("templates-0"), load_dataset("templates-0.3", seed=2)
    for c in range(10):
        images = torch.cat([clean.train_images[clean.train_labels == c], clean.test_images[clean.test_labels == c]])
        assert (images == images[0]).all()                          # one image a class, in both splits
    assert torch.equal(noisy.train_images, templates(0.3, seed=2).train_images) and noisy.name == "templates-0.3"
    assert not torch.equal(noisy.train_images, templates(0.3, seed=3).train_images)
    assert noisy.train_labels.bincount().tolist() == [400] * 10 and noisy.test_labels.bincount().tolist() == [200] * 10
    with pytest.raises(FileNotFoundError, match="no data set"): load_dataset("templates-loud", "/nowhere")


@pytest.mark.parametrize("change, message", [
    (lambda d: dict(train_images=d.train_images.float()), "expected uint8"),
    (lambda d: dict(train_images=d.train_images[:, 0]), "expected uint8 of shape"),
    (lambda d: dict(train_labels=d.train_labels[:-1]), "expected int64 "),
    (lambda d: dict(train_labels=d.train_labels.int()), "expected int64"),
    (lambda d: dict(train_labels=d.train_labels + 1), "expected 0 to 3"),
    (lambda d: dict(test_labels=d.test_labels - 1), "expected 0 to 3"),
    (lambda d: dict(test_images=d.test_images[..., 1:]), "test images"),
    (lambda d: dict(fine_train_labels=d.train_labels), "fine_train_labels"),
])
def test_bad_data_is_refused(change, message):
    from dataclasses import replace
    data = synthetic()
    with pytest.raises(ValueError, match=message): replace(data, **change(data))


def test_subset_is_nested_stratified_and_keeps_all_labels(digits):
    data = digits.coarsen("pairs").with_label_noise(0.3, seed=2)
    small, large = data.subset(20, 5, seed=3), data.subset(40, 5, seed=3)
    assert small.train_labels.bincount().tolist() == [20] * 5
    rows = lambda d: set(map(bytes, d.train_images.flatten(1).numpy()))
    assert rows(small) <= rows(large)
    where = {bytes(x): i for i, x in enumerate(data.train_images.flatten(1).numpy())}
    index = torch.tensor([where[bytes(x)] for x in small.train_images.flatten(1).numpy()])
    for name in ("train_labels", "fine_train_labels", "clean_train_labels"):
        assert torch.equal(getattr(small, name), getattr(data, name)[index])
    assert not torch.equal(small.train_images, data.subset(20, 5, seed=4).train_images)
    with pytest.raises(ValueError, match="asked for 10000"): data.subset(10000)
    with pytest.raises(ValueError, match="at least 1"): data.subset(0)


@pytest.mark.parametrize("partition", ["binary", "pairs", [0, 1, 0, 1], ((0, 3), (1, 2)), torch.tensor([1, 1, 0, 0]),
                                       np.array([0, 1, 2, 2])])
def test_coarsen(partition):
    data = synthetic()
    coarse = data.coarsen(partition)
    assert torch.equal(coarse.fine_train_labels, data.train_labels) and coarse.fine_classes == data.classes
    table = {int(f): int(c) for f, c in zip(coarse.fine_train_labels, coarse.train_labels, strict=True)}
    assert [table[int(f)] for f in coarse.fine_test_labels] == coarse.test_labels.tolist()     # both splits
    for k, name in enumerate(coarse.classes):
        assert name == "+".join(data.classes[f] for f in sorted(f for f, c in table.items() if c == k))


@pytest.mark.parametrize("partition", ["thirds", "animals_vehicles", ((0, 1), (2,)), ((0, 1), (1, 2, 3)), [0, 0, 0, 0],
                                       [0, 2, 2, 0], [0, 1], ((0, 1, 2, 3), ()), (), [-1, 0, 1, 0]])
def test_bad_partition(partition):
    with pytest.raises(ValueError, match="partition"): synthetic().coarsen(partition)


def test_animals_vehicles_and_odd_pairs():
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    from dataclasses import replace
    data = replace(synthetic(K=10, n_train=100), classes=names).coarsen("animals_vehicles")
    assert data.classes == ("animals", "vehicles")
    assert set(data.fine_train_labels[data.train_labels == 1].tolist()) == {0, 1, 8, 9}
    with pytest.raises(ValueError, match="cannot be paired"): synthetic(K=5).coarsen("pairs")


def test_coarsening_twice_keeps_the_finest_labels(digits):
    twice = digits.coarsen("pairs").coarsen([0, 0, 0, 1, 1])
    assert torch.equal(twice.fine_train_labels, digits.train_labels) and twice.num_classes == 2
    assert torch.equal(twice.train_labels, (digits.train_labels >= 6).long())


@given(fraction=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_label_noise(fraction, seed):
    data = synthetic(n_train=400)
    noisy = data.with_label_noise(fraction, seed)
    again = data.with_label_noise(fraction, seed)
    assert torch.equal(noisy.train_labels, again.train_labels)
    assert torch.equal(noisy.clean_train_labels, data.train_labels) and torch.equal(noisy.test_labels, data.test_labels)
    assert int((noisy.train_labels != data.train_labels).sum()) <= round(fraction * 400)


def test_fully_random_labels_are_independent_and_uniform(digits):
    noisy = digits.with_label_noise(1.0, seed=0)
    N, K = len(noisy.train_labels), 10
    agree = int((noisy.train_labels == digits.train_labels).sum())
    assert abs(agree - N / K) < 5 * (N * 0.1 * 0.9) ** 0.5
    assert (noisy.train_labels.bincount() - N / K).abs().max() < 5 * (N * 0.1 * 0.9) ** 0.5
    with pytest.raises(ValueError, match="fraction=1.5: expected a number"): digits.with_label_noise(1.5)


def test_noise_and_coarse_classes_commute_where_they_should(digits):
    data = digits.with_label_noise(1.0, seed=0).coarsen("pairs")
    assert torch.equal(data.fine_train_labels, digits.train_labels)           # the fine labels are the correct ones
    assert torch.equal(data.clean_train_labels, digits.train_labels // 2)


def test_imbalance(digits):
    data = digits.with_imbalance(10, seed=1)
    counts = data.train_labels.bincount().tolist()
    assert counts == sorted(counts, reverse=True) and abs(counts[0] / counts[-1] - 10) < 0.4
    assert torch.equal(data.test_labels, digits.test_labels)
    with pytest.raises(ValueError, match="would be empty"): digits.with_imbalance(1e6)
    with pytest.raises(ValueError, match="at least 1"): digits.with_imbalance(0.5)


def test_channel_stats_are_exact():
    data = synthetic(channels=3)
    mean, std = data.channel_stats()
    x = data.train_images.double() / 255
    assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-14)
    assert torch.allclose(std, x.std((0, 2, 3), correction=0), atol=1e-14)


# -- loading -----------------------------------------------------------------------------------------------------

def check_folder_data(data, pixels, count=3):
    assert data.classes == ("cat", "dog") and data.train_labels.tolist() == [0] * count + [1] * count
    for k, c in enumerate(data.classes):
        for i in range(count):
            for split, images in (("train", data.train_images), ("test", data.test_images)):
                assert np.array_equal(images[k * count + i].permute(1, 2, 0).numpy().squeeze(), pixels[split, c, i])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_image_folder(tmp_path, mode):
    pixels = image_folder(tmp_path / "pets", mode=mode)
    data = load_dataset("pets", tmp_path)
    assert data.image_shape == (3 if mode == "RGB" else 1, 8, 8) and "pets" in data.note
    check_folder_data(data, pixels)
    check_folder_data(load_dataset(tmp_path / "pets"), pixels)


@pytest.mark.parametrize("suffix", [".tar.xz", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("prefix", ["", "cifar10"])
def test_archive(tmp_path, suffix, prefix):
    pixels = image_folder(tmp_path / "folder")
    archive_of(tmp_path / "folder", tmp_path / f"pets{suffix}", prefix)
    data = load_dataset(tmp_path / f"pets{suffix}")
    check_folder_data(data, pixels)
    assert data.name == "pets"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["folder", f"pets{suffix}", f"pets{suffix}.decoded"])


def test_the_last_of_two_files_with_one_path_counts(tmp_path):
    pixels = image_folder(tmp_path / "pets")
    folders = [tmp_path / "pets", tmp_path / "more"]
    (folders[1] / "train/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folders[1] / "train/cat/1.png")
    with tarfile.open(tmp_path / "pets.tgz", "w:gz") as tar:
        for folder in folders: tar.add(folder, arcname=".")
    pixels["train", "cat", 1] = np.full((8, 8, 3), (255, 0, 0))
    check_folder_data(load_dataset(tmp_path / "pets.tgz"), pixels)


@pytest.mark.parametrize("name, kind", [
    ("../../evil/train/cat/0.png", tarfile.REGTYPE), ("/train/cat/0.png", tarfile.REGTYPE),
    ("train/cat/0.png", tarfile.SYMTYPE), ("train/cat/0.png", tarfile.LNKTYPE)])
def test_archive_that_points_outside_is_refused(tmp_path, name, kind):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match="refusing"): load_dataset(tmp_path / "evil.tar.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar.gz"]


def test_cache_is_read_and_follows_its_source(tmp_path, monkeypatch):
    import nc_nbdev.vision.sources as module
    pixels = image_folder(tmp_path / "pets")
    load_dataset("pets", tmp_path)
    decode, calls = module._decode, []
    monkeypatch.setattr(module, "_decode", lambda *a: (calls.append(a), decode(*a))[1])
    check_folder_data(load_dataset("pets", tmp_path), pixels)
    assert not calls
    changed_file = pixels["train", "cat", 0][::-1]
    Image.fromarray(changed_file.copy()).save(tmp_path / "pets/train/cat/0.png")
    os.utime(tmp_path / "pets/train/cat/0.png", ns=(1, 1))
    changed = load_dataset("pets", tmp_path)
    assert len(calls) == 12 and np.array_equal(changed.train_images[0].permute(1, 2, 0), changed_file)
    (tmp_path / "pets/train/dog/2.png").unlink()
    assert len(load_dataset("pets", tmp_path).train_labels) == 5


def test_damaged_decoded_data_are_set_aside_with_a_warning(tmp_path):
    pixels = image_folder(tmp_path / "pets")
    load_dataset("pets", tmp_path)
    kept = tmp_path / "pets.decoded/arrays.pt"
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.warns(UserWarning, match="arrays.pt"): check_folder_data(load_dataset("pets", tmp_path), pixels)
    check_folder_data(load_dataset("pets", tmp_path), pixels)
    assert len(list((tmp_path / "pets.decoded").glob("arrays.pt.damaged*"))) == 1


def test_bad_folders(tmp_path):
    image_folder(tmp_path / "sizes"); Image.new("RGB", (9, 9)).save(tmp_path / "sizes/train/cat/big.png")
    with pytest.raises(ValueError, match="different sizes"): load_dataset("sizes", tmp_path)
    image_folder(tmp_path / "broken"); (tmp_path / "broken/train/cat/x.png").write_text("no image")
    with pytest.raises(ValueError, match="x.png: not an image"): load_dataset("broken", tmp_path)
    image_folder(tmp_path / "classes"); (tmp_path / "classes/test/cat").rename(tmp_path / "classes/test/cow")
    with pytest.raises(ValueError, match="cat.*cow.*not classes of both"): load_dataset("classes", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found 0 train and 0 test"): load_dataset("empty", tmp_path)
    image_folder(tmp_path / "hidden")
    for file in ("train/cat/.DS_Store", "labels.txt"): (tmp_path / "hidden" / file).write_text("x")
    assert len(load_dataset("hidden", tmp_path).train_labels) == 6


def test_grey_and_colour_together(tmp_path):
    image_folder(tmp_path / "mixed"); Image.new("L", (8, 8), 77).save(tmp_path / "mixed/train/cat/0.png")
    data = load_dataset("mixed", tmp_path)
    assert data.train_images[0, :, 0, 0].tolist() == [77, 77, 77]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_opaque_images_of_any_mode_are_read(tmp_path, mode):
    image_folder(tmp_path / "a", classes=("cat",))
    file = tmp_path / "a/train/cat/0.png"
    Image.new("RGB", (8, 8), "white").convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    image_folder(tmp_path / "a", classes=("dog",))
    assert (load_dataset(tmp_path / "a").train_images[0] == 255).all()


@pytest.mark.parametrize("name", [n for n in dataset_names if n not in ("digits", "templates")])
def test_missing_data_set(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"load_dataset\\('{name}'") as error:
        load_dataset(name, tmp_path, download=False)
    assert str(tmp_path) in str(error.value) and "cp -r" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_is_a_missing_data_set(tmp_path, monkeypatch):
    import torchvision
    def fail(*args, **kwargs): raise RuntimeError("no network")
    monkeypatch.setattr(torchvision.datasets.MNIST, "__init__", fail)
    with pytest.raises(FileNotFoundError, match="no network"): load_dataset("mnist", tmp_path / "new")


def test_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one of digits, mnist"): load_dataset("minst", tmp_path)


def write_mnist(root, count=6):
    "Files in the format of MNIST, as torchvision reads them."
    raw = root / "MNIST/raw"; raw.mkdir(parents=True)
    rng, kept = np.random.default_rng(0), {}
    for split in ("train", "t10k"):
        x, y = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(np.array([2051, count, 28, 28], ">i4").tobytes() + x.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + y.tobytes())
        kept[split] = x
    return kept


def test_torchvision_layout(tmp_path):
    kept = write_mnist(tmp_path)
    for _ in range(2):                                              # decoded, then from the cache
        data = load_dataset("mnist", tmp_path, download=False)
        assert data.image_shape == (1, 28, 28) and data.classes == tuple("0123456789") and data.note == ""
        assert np.array_equal(data.train_images[:, 0], kept["train"])
        assert np.array_equal(data.test_images[:, 0], kept["t10k"])
    assert (tmp_path / "mnist.decoded/arrays.pt").is_file()


def test_image_folder_stands_in_for_a_torchvision_set(tmp_path):
    image_folder(tmp_path / "cifar10", suffix="jpg")
    data = load_dataset("cifar10", tmp_path, download=False)
    assert data.name == "cifar10" and "lossy" in data.note and "lossy" in repr(data)


if "NC_DATA" in os.environ:  # a folder with the real MNIST and CIFAR-10

    def test_real_mnist():
        data = load_dataset("mnist", os.environ["NC_DATA"], download=False)
        assert (len(data.train_labels), len(data.test_labels)) == (60000, 10000)
        assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
        mean, std = data.channel_stats()
        assert abs(mean.item() - 0.1307) < 1e-4 and abs(std.item() - 0.3081) < 1e-4

    def test_real_cifar10():
        data = load_dataset("cifar10", os.environ["NC_DATA"], download=False)
        assert data.train_labels.bincount().tolist() == [5000] * 10
        assert data.test_labels.bincount().tolist() == [1000] * 10
        assert data.coarsen("animals_vehicles").train_labels.bincount().tolist() == [30000, 20000]


# -- batches -----------------------------------------------------------------------------------------------------

def loader(N=50, batch_size=16, **kwargs):
    images = (torch.arange(N)[:, None, None, None] % 256).expand(N, 1, 8, 8).to(torch.uint8)
    return TensorLoader(images, torch.arange(N), batch_size, **kwargs)


@given(N=st.integers(1, 70), B=st.integers(1, 20), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_sample_once(N, B, shuffle):
    dl = loader(N, B, shuffle=shuffle)
    batches = list(dl)
    seen = torch.cat([y for _, y in batches]).tolist()
    assert len(batches) == len(dl) and [len(y) for _, y in batches] == dl.batch_sizes()
    assert sorted(seen) == list(range(N))
    if shuffle and N > 1 and B > 1: assert min(dl.batch_sizes()) > 1
    if not shuffle: assert seen == list(range(N))
    for x, y in batches: assert torch.allclose(x[:, 0, 0, 0] * 255, y.float())


@pytest.mark.parametrize("augment", [None, "crop_flip"])
def test_order_is_a_function_of_seed_and_epoch(augment):
    def epoch(dl): return [(x.clone(), y.clone()) for x, y in dl]
    def same(a, b): return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))
    make = lambda seed=0: loader(shuffle=True, seed=seed, augment=augment)
    straight = make()
    epochs = [epoch(straight) for _ in range(4)]
    assert not same(epochs[0], epochs[1]) and not same(epochs[0], epoch(make(1)))
    assert same(epoch(make().set_epoch(3)), epochs[3])                 # resumed
    other = make(); next(iter(other)); torch.rand(5)                   # an abandoned pass changes nothing
    assert same(epoch(other), epochs[0])


def test_crop_flip_against_a_loop():
    images = torch.randint(0, 256, (40, 3, 6, 9), dtype=torch.uint8)
    result = crop_flip(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    kinds = set()
    for i in range(len(images)):
        window = lambda r, c, f, i=i: padded[i, :, r:r + 6, c:c + 9].flip([2] if f else [])
        places = [(r, c, f) for r in range(5) for c in range(5) for f in (False, True)]
        matches = [place for place in places if torch.equal(result[i], window(*place))]
        assert len(matches) == 1
        kinds.add(matches[0])
    assert len({f for *_, f in kinds}) == 2 and len({r for r, *_ in kinds}) == 5 and len({c for _, c, _ in kinds}) == 5


def test_loaders(digits):
    data = digits.with_label_noise(1.0)
    train, clean, test = loaders(data, 128, augment="crop_flip")
    assert (train.augment, clean.augment, test.augment) == ("crop_flip", None, None)
    assert not clean.shuffle and torch.equal(clean.labels, data.train_labels) and clean.images is train.images
    assert torch.equal(clean.class_counts, data.train_labels.bincount())
    x = torch.cat([x for x, _ in clean]).double()
    assert abs(x.mean()) < 1e-5 and abs(x.std(correction=0) - 1) < 1e-5
    mean, std = data.channel_stats()
    expected = ((data.test_images.double() / 255 - mean) / std).float()
    assert torch.allclose(torch.cat([x for x, _ in test]), expected, atol=1e-5)


def test_bad_loaders():
    with pytest.raises(ValueError, match="2 images and 3 labels"):
        TensorLoader(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(3))
    with pytest.raises(ValueError, match="no images"): loader(0)
    with pytest.raises(ValueError, match="batch_size=0"): loader(batch_size=0)
    with pytest.raises(ValueError, match="augment='mixup'"): loader(augment="mixup")
    with pytest.raises(ValueError, match="at least 0"): list(loader(shuffle=True, seed=-1))


def test_constant_channel_is_not_divided_by_zero():
    images = torch.full((4, 1, 8, 8), 7, dtype=torch.uint8)
    data = ImageData("flat", images, torch.arange(4) % 2, images, torch.arange(4) % 2, ("a", "b"))
    assert all(torch.isfinite(x).all() for dl in loaders(data) for x, _ in dl)


def test_plain_fastai_learner(digits):
    import fastai.callback.progress  # noqa: F401, gives Learner its no_bar
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy

    from nc_nbdev.vision.models import build_model
    train, _, test = loaders(digits.subset(43, seed=0), 143)          # 430 images: one over, without the rule for it
    assert train.batch_sizes() == [143, 143, 144]
    torch.manual_seed(0)
    model = build_model("small_resnet", 10, in_channels=1, width=4)
    loss = torch.nn.functional.cross_entropy
    learn = Learner(DataLoaders(train, test, device="cpu"), model, loss_func=loss, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert train.epoch == 2 and len(learn.recorder.values) == 2
    assert len(learn.dls.train_ds) == 430 and learn.dls.one_batch()[0].shape == (143, 1, 8, 8)
    assert learn.get_preds(dl=test)[0].shape == (359, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_batches_on_a_gpu(digits):
    for a, b in zip(*(loaders(digits, 128, augment="crop_flip", device=d)[0] for d in ("cpu", "cuda")), strict=True):
        assert torch.equal(a[1], b[1].cpu()) and torch.allclose(a[0], b[0].cpu(), atol=1e-6)


def test_train_metrics_are_recorded():
    from fastai.metrics import accuracy
    recipe = ImageRecipe(epochs=1, train_per_class=20, test_per_class=10, width=4)
    learn = recipe.learner()
    learn.metrics, learn.recorder.train_metrics = [accuracy], True
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    found = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0], strict=False))
    assert 0 < found["train_accuracy"] < 1


def test_labels_that_are_left_out_are_counted_in_no_class():
    images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, -100, 1, 2, -100])
    assert TensorLoader(images, labels).class_counts.tolist() == [1, 2, 1]


def test_images_that_are_not_square_need_another_model_than_mlp():
    images, labels = torch.randint(256, (6, 1, 8, 12), dtype=torch.uint8), torch.arange(6) % 2
    wide = ImageData("wide", images, labels, images, labels, ("a", "b"))
    with pytest.raises(ValueError, match="mlp, with images of 8 x 12 pixels"):
        make_learner(ImageRecipe(model="mlp"), wide)
    assert make_learner(ImageRecipe(), wide).model(torch.zeros(2, 1, 8, 12)).shape == (2, 2)


def test_the_digits_by_a_path():
    assert torch.equal(load_dataset(Path("digits")).train_images, load_dataset("digits").train_images)
