"The callbacks and the metric against `measure`, in real runs of the real packages."
import pickle
import subprocess
import sys
import warnings
from itertools import count

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_net import Net, few_digits
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from nc_nbdev.lab.history import COLUMNS
from nc_nbdev.lab.integrations import Watcher, in_order
from nc_nbdev.lab.report import measure


@pytest.fixture(scope="module")
def data(): return few_digits()


@pytest.fixture(scope="module")
def sets(data): return TensorDataset(data.x, data.y), TensorDataset(data.test_x, data.test_y)


def test_nothing_is_imported_before_it_is_used():
    code = ("import sys, nc_nbdev.lab.integrations\n"
            "print(*[m for m in ('lightning', 'transformers', 'torchmetrics') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("name, package", [("LightningCollapse", "lightning"), ("TrainerCollapse", "transformers"),
                                           ("CollapseMetric", "torchmetrics")])
def test_a_package_that_is_missing(name, package, monkeypatch):
    import nc_nbdev.lab.integrations as module
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(vars(module), name, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'nc_nbdev\[{package}\]'"): getattr(module, name)
    with pytest.raises(AttributeError): module.Nothing  # noqa: B018


def test_loaders_in_order(sets):
    shuffled = DataLoader(sets[0], 100, shuffle=True, drop_last=True)
    assert torch.equal(torch.cat([y for _, y in in_order(shuffled)]), sets[0].tensors[1])
    plain = DataLoader(sets[0], 100)
    assert in_order(plain) is plain and in_order(batches := [1]) is batches
    opens = DataLoader(Opened(sets[0]), 100, shuffle=True, num_workers=1, worker_init_fn=open_in_worker, timeout=60)
    assert torch.equal(torch.cat([y for _, y in in_order(opens)]), sets[0].tensors[1])


class Opened(Dataset):
    "A data set that is opened in each worker."
    file = None
    def __init__(self, samples): self.samples = samples
    def __len__(self): return len(self.samples)
    def __getitem__(self, i): return self.file[i]


def open_in_worker(number):
    found = get_worker_info().dataset
    found.file = found.samples


class Odd(Sampler):
    "Half of the samples, in an order drawn by a generator of its own."
    def __init__(self, size): self.size, self.generator = size, torch.Generator().manual_seed(0)
    def __len__(self): return self.size // 2
    def __iter__(self): yield from (2 * torch.randperm(len(self), generator=self.generator) + 1).tolist()


class Endless(Sampler):
    def __init__(self): pass
    def __iter__(self): yield from count()


def test_loaders_with_samplers(sets):
    y, weights = sets[0].tensors[1], torch.zeros(len(sets[0]))
    weights[7:30] = torch.rand(23) + 0.1
    read = lambda sampler, **how: torch.cat([y for _, y in in_order(DataLoader(sets[0], sampler=sampler, **how))])
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([5, 3]), num_replicas=2, rank=0)
    for sampler, expected in ((SubsetRandomSampler([5, 3, 8]), y[[5, 3, 8]]), (wrapped, y[[5, 3]]), (Endless(), y),
                              (WeightedRandomSampler(weights, 99), y[7:30]), (RandomSampler(sets[0]), y),
                              (DistributedSampler(sets[0], num_replicas=2, rank=0), y)):
        assert torch.equal(read(sampler, batch_size=4, drop_last=True), expected)
    odd, first, before = Odd(len(y)), list(Odd(len(y))), torch.get_rng_state()
    loader = in_order(DataLoader(sets[0], sampler=odd, batch_size=7))
    assert torch.equal(torch.get_rng_state(), before) and list(odd) == first
    assert torch.equal(torch.cat([y for _, y in loader]), y[first])
    ready = BatchSampler(RandomSampler(sets[0]), 50, True)
    assert len(read(ready, batch_size=None)) == len(y) // 50 * 50          # batches that the data set makes itself
    batches = in_order(DataLoader(sets[0], batch_sampler=ready))
    assert torch.equal(torch.cat([y for _, y in batches]), y) and batches.batch_size == 50
    own = DataLoader(sets[0], batch_sampler=[[1, 2], [3]])
    assert in_order(own) is own
    assert torch.equal(read(RandomSampler(range(9))), y[:9])       # which draws from a part of the data set


class Draws(Sampler):
    "In an order drawn by a generator of NumPy, perhaps beside something that cannot be copied."
    def __init__(self, size, beside=None): self.size, self.rng, self.beside = size, np.random.default_rng(0), beside
    def __len__(self): return self.size
    def __iter__(self): yield from self.rng.permutation(self.size).tolist()


def test_training_draws_the_same_numbers(sets):
    net, size = Net(), len(sets[0])
    watched, alone = Draws(size), Draws(size)
    Watcher("pool").measure_epoch(net, 0, DataLoader(sets[0], 100, sampler=watched), None)
    assert list(watched) == list(alone)
    assert len(in_order(DataLoader(sets[0], sampler=Draws(size, (i for i in ())), batch_size=9)).sampler) == size
    shared, alone = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    loaders = [DataLoader(s, 100, shuffle=not i, generator=shared) for i, s in enumerate(sets)]
    Watcher("pool").measure_epoch(net, 0, *loaders)
    assert torch.equal(shared.get_state(), alone.get_state())


class Stream(IterableDataset):
    "The samples one after the other; it has no length."
    def __init__(self, dataset): self.dataset = dataset
    def __iter__(self): yield from self.dataset


def test_the_shares_of_processes_are_put_together(sets):
    from accelerate.data_loader import prepare_data_loader
    share, whole = dict(num_processes=2, process_index=1, put_on_device=False), [DataLoader(s, 500) for s in sets]
    distributed = DataLoader(sets[1], 100, sampler=DistributedSampler(sets[1], num_replicas=2, rank=1))
    accelerated = [prepare_data_loader(DataLoader(s, 50, shuffle=True), **share) for s in sets]
    evenly = prepare_data_loader(DataLoader(sets[1], 50), split_batches=True, **share)
    expected = measure(net := Net(), *whole, "pool")
    for train, test in ((accelerated[0], accelerated[1]), (whole[0], distributed), (whole[0], evenly)):
        watcher = Watcher("pool")
        watcher.measure_epoch(net, 0, train, {"test": test})
        same(watcher.history, expected, 0)


def test_a_loader_that_may_be_a_share_is_named(sets, monkeypatch):
    streams = DataLoader(Stream(sets[1]), 100)
    assert Watcher("pool", test_dl=streams).measure_epoch(Net(), 0, DataLoader(sets[0], 500), None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    replicas = Draws(len(sets[0]))
    replicas.num_replicas = 2
    for loader in (streams, DataLoader(sets[0], batch_sampler=[[1, 2], [3]]), DataLoader(sets[0], sampler=replicas)):
        with pytest.warns(UserWarning, match="samples of this process only.*train_dl= and test_dl="): in_order(loader)
    with warnings.catch_warnings(action="error"): in_order(DataLoader(sets[0], 100, shuffle=True))


@pytest.mark.filterwarnings("ignore:.*not measured")
def test_a_training_that_goes_wrong(sets):
    net, watcher = Net(), Watcher("pool")
    loaders = [DataLoader(s, 500) for s in sets]
    logged = watcher.measure_epoch(net, 0, *loaders)
    with torch.no_grad(): next(net.parameters()).fill_(float("nan"))
    with pytest.warns(UserWarning, match="epoch 1: .* not measured"): broken = watcher.measure_epoch(net, 1, *loaders)
    assert broken.keys() == logged.keys() and all(v != v for v in broken.values())
    assert watcher.history.query("epoch == 1 and value.notna()").empty and watcher.reasons[1]
    with pytest.raises(ValueError): Watcher("pool").measure_epoch(net, 0, *loaders)


def test_numbers_to_predict_are_logged():
    x = torch.randn(40, 6)
    loader = DataLoader(TensorDataset(x, x[:, :2] + 0.1), 20)
    watcher = Watcher()
    logged = watcher.measure_epoch(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), 0, loader, loader)
    assert {"collapse/train/output/r2", "collapse/test/output/mse", "collapse/train/2:input/nrc1"} <= {*logged}
    assert {key.split("/")[-1] for key in logged} >= {*watcher.history.measure} - {"noise"}


def same(history, report, epoch):
    "The rows of an epoch are those of a report."
    rows = history[history.epoch == epoch].set_index(["split", "layer", "measure"]).value.to_dict()
    expected = report.frame.set_index(["split", "layer", "measure"]).value.to_dict()
    assert rows.keys() == expected.keys()
    assert rows == pytest.approx(expected, rel=1e-4, abs=1e-6)


# -- Lightning ---------------------------------------------------------------------------------------------------------

def lightning_run(sets, *callbacks, epochs=3, sampler=None, lr=0.01, module=None, tests=None, **resume):
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Net()

        def training_step(self, batch, i): return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        def validation_step(self, batch, i, dataloader_idx=0): pass
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr)

    module, logger = module or Module(), Kept()
    trainer = L.Trainer(max_epochs=epochs, callbacks=[*callbacks], logger=logger.made(), enable_checkpointing=False,
                        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(sets[0], 100, shuffle=sampler is None, sampler=sampler),
                tests or DataLoader(sets[1], 100), **resume)
    return trainer, module, logger


class Kept:
    "What a logger was given."
    def __init__(self): self.logged = {}

    def made(self):
        from lightning.pytorch.loggers.logger import DummyLogger
        kept = self.logged
        class Logger(DummyLogger):
            def log_metrics(self, metrics, step=None): kept.setdefault(step, {}).update(metrics)
        return Logger()


@pytest.mark.filterwarnings("ignore")
def test_lightning(sets):
    from nc_nbdev.lab.integrations import LightningCollapse
    watcher = LightningCollapse(layers="pool", every=2, condition="a", seed=3)
    trainer, module, logger = lightning_run(sets, watcher)
    history = watcher.history
    assert tuple(history.columns) == COLUMNS and sorted(history.epoch.unique()) == [0, 2, 3]
    assert set(history.condition) == {"a"} and set(history.seed) == {3} and set(history.split) == {"train", "test"}
    same(history, measure(module.net, DataLoader(sets[0], 512), DataLoader(sets[1], 512), "pool"), 3)
    logged = [step for step, values in logger.logged.items() if "collapse/train/pool/nc1_trace" in values]
    assert len(logged) == 3 and 0 in logged
    last = history.query("epoch == 3 and split == 'train' and measure == 'nc1_trace'").value.item()
    assert trainer.callback_metrics["collapse/train/pool/nc1_trace"] == pytest.approx(last)
    alone = lightning_run(sets)[1]                                # watching changes nothing
    for p, q in zip(module.parameters(), alone.parameters(), strict=True): assert torch.equal(p, q)
    pickle.dumps(LightningCollapse(layers="pool"))
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"every={every}: expected a positive"): LightningCollapse(every=every)
    assert LightningCollapse(every=np.int64(2)).every == 2


@pytest.mark.filterwarnings("ignore")
def test_lightning_measures_what_the_sampler_draws_and_goes_on(sets):
    from nc_nbdev.lab.integrations import LightningCollapse
    watcher, half = LightningCollapse(layers="pool", every=2), list(range(100, 250))
    module = lightning_run(sets, watcher, sampler=SubsetRandomSampler(half), epochs=2)[1]
    seen = DataLoader(Subset(sets[0], half), 512)
    same(watcher.history, measure(module.net, seen, DataLoader(sets[1], 512), "pool"), 2)
    broken = LightningCollapse(layers="pool")
    trainer = lightning_run(sets, broken, lr=1e30, epochs=2)[0]
    assert trainer.current_epoch == 2 and broken.history.query("epoch == 2").value.isna().any() and broken.reasons
    with pytest.raises(ValueError, match="another network, a Net, .* make a new one"):
        lightning_run(sets, watcher, epochs=1)
    lightning_run(sets, watcher, module=module, epochs=2)           # another trainer counts from 0, the history goes on
    assert sorted(watcher.history.epoch.unique()) == [0, 2, 4] and not watcher.history.duplicated(
        ["epoch", "split", "layer", "measure"]).any()


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_the_epochs_that_were_trained(sets, tmp_path):
    import lightning as L

    from nc_nbdev.lab.integrations import LightningCollapse

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module): trainer.should_stop = trainer.current_epoch == 2

    watcher = LightningCollapse(layers="pool", every=2)
    trainer, module, _ = lightning_run(sets, watcher, Stop(), epochs=9)
    trainer.save_checkpoint(tmp_path / "three")
    lightning_run(sets, watcher, module=module, epochs=2)
    assert sorted(watcher.history.epoch.unique()) == [0, 2, 5]
    resumed = LightningCollapse(layers="pool")
    lightning_run(sets, resumed, epochs=4, ckpt_path=tmp_path / "three", weights_only=False)
    assert sorted(resumed.history.epoch.unique()) == [3, 4]


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_a_list_of_validation_loaders(sets):
    from nc_nbdev.lab.integrations import LightningCollapse
    several, one = LightningCollapse(layers="pool"), LightningCollapse(layers="pool")
    module = lightning_run(sets, several, epochs=1, tests=[DataLoader(s, 100) for s in sets])[1]
    train, test = (DataLoader(s, 512) for s in sets)
    same(several.history, measure(module.net, train, {"test0": train, "test1": test}, "pool"), 1)
    lightning_run(sets, one, epochs=1, tests=[DataLoader(sets[1], 100)])
    assert set(one.history.split) == {"train", "test"}


# -- Hugging Face ------------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reporters", [False, True])
def test_hugging_face(reporters, data, tmp_path):
    import transformers

    from nc_nbdev.lab.integrations import TrainerCollapse
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    def fit(*callbacks):
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=100, report_to="none", use_cpu=True, seed=0,
            save_strategy="no", logging_strategy="no", disable_tqdm=True)
        rows = lambda x, y: [dict(pixel_values=a, labels=b) for a, b in zip(x, y, strict=True)]
        torch.manual_seed(0)
        model, tests = transformers.ViTForImageClassification(config), rows(data.test_x, data.test_y)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows(data.x, data.y), eval_dataset=tests,
                                       callbacks=[*callbacks])
        if reporters and callbacks: callbacks[0].trainer = trainer
        trainer.train()
        return trainer
    watcher = TrainerCollapse(layers="classifier:input")
    trainer = fit(watcher)
    assert sorted(watcher.history.epoch.unique()) == [0, 1, 2]
    batches = [dict(pixel_values=x, labels=y) for x, y in ((data.x, data.y), (data.test_x, data.test_y))]
    report = measure(trainer.model, batches[:1], batches[1:] if reporters else None, layers="classifier:input")
    same(watcher.history, report, 2)
    logged = [e for e in trainer.state.log_history if "collapse/train/classifier:input/nc1_trace" in e]
    assert [e["epoch"] for e in logged] == [0, 1, 2] and [e["step"] for e in logged] == [0, 3, 6]
    if not reporters:
        for p, q in zip(trainer.model.parameters(), fit().model.parameters(), strict=True): assert torch.equal(p, q)
    else:
        with pytest.raises(ValueError, match="another network, a ViT.* make a new one"): fit(watcher)
        trainer.train()
        assert sorted(watcher.history.epoch.unique()) == [0, 1, 2, 3, 4]


class Model(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
    def forward(self, x, labels=None):
        out = self.head(self.body(x).relu())
        return out if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_counts_the_epochs_that_were_trained(tmp_path):
    import transformers

    from nc_nbdev.lab.integrations import TrainerCollapse
    rows = [dict(x=torch.randn(6), labels=i % 4) for i in range(40)]     # five steps an epoch
    def epochs(every=1, resume=None, save="no", **how):
        arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_strategy=save,
                                                   disable_tqdm=True, logging_strategy="no", **how)
        callback = TrainerCollapse(every=every)
        trainer = transformers.Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        assert not callback.history.duplicated(["epoch", "split", "layer", "measure"]).any()
        return sorted(callback.history.epoch.unique())
    assert epochs(max_steps=2, every=5) == [0, 1] and epochs(num_train_epochs=2.4) == [0, 1, 2, 3]
    assert epochs(num_train_epochs=2, save="epoch") == [0, 1, 2]
    assert epochs(num_train_epochs=3, resume=str(tmp_path / "checkpoint-10")) == [2, 3]


@pytest.mark.filterwarnings("ignore:.*torch.jit|.*deprecated")
@pytest.mark.parametrize("known", [False, True])
def test_hugging_face_with_several_validation_sets(known, tmp_path):
    import transformers

    from nc_nbdev.lab.integrations import TrainerCollapse
    rows = [dict(x=torch.randn(6), labels=i % 4) for i in range(40)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
    callback, sets = TrainerCollapse(), {"a": rows[:20], "b": rows[20:]}
    trainer = transformers.Trainer(Model(), arguments, train_dataset=rows, eval_dataset=sets, callbacks=[callback])
    if known:
        callback.trainer = trainer
        trainer.train()
        assert {*callback.history.split} == {"train", "a", "b"} and {*callback.history.epoch} == {0, 1}
        return
    with pytest.warns(UserWarning, match="set callback.trainer = trainer, or give test_dl=") as seen: trainer.train()
    assert len([w for w in seen if "callback.trainer" in str(w.message)]) == 1
    assert {*callback.history.split} == {"train"}


# -- torchmetrics ------------------------------------------------------------------------------------------------------

H, Y = torch.randn(120, 5, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 4
W, B = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(4)


def direct(H=H, y=Y, head=(W, B)):
    from nc_nbdev.geometry.measures import measure_features
    return measure_features(H, y, num_classes=len(head[0]), head=head).to_dict()


def agrees(found, expected):
    for name in ("nc1_trace", "cdnv", "nc2_etf", "nc3_duality"):
        assert found[name].item() == pytest.approx(expected[name])


def head(): return W, B


def test_metric():
    import torchmetrics

    from nc_nbdev.lab.integrations import CollapseMetric
    metric = CollapseMetric(4, 5, head=head)
    assert torch.isnan(metric(H[:1], Y[:1])["nc1_trace"])                     # one class: no distance between classes
    metric.reset()
    for h, y in zip(H.split(17), Y.split(17), strict=True): metric(h, y)
    agrees(metric.compute(), direct())
    a, b = CollapseMetric(4, 5, head=head), CollapseMetric(4, 5, head=head)
    a.update(H[:50], Y[:50]); b.update(H[50:], Y[50:]); a.merge_state(b)
    agrees(a.compute(), direct())
    copy = pickle.loads(pickle.dumps(a))
    agrees(copy.compute(), direct())
    a.persistent(True)
    other = CollapseMetric(4, 5, head=head)
    other.persistent(True)
    other.load_state_dict(a.state_dict())
    assert torch.equal(other.state, a.state)
    collection = torchmetrics.MetricCollection({"collapse": CollapseMetric(4, 5)})
    collection.update(H, Y)
    assert "nc1_trace" in " ".join(collection.compute()) and not any("nc3" in name for name in collection.compute())
    some = CollapseMetric(9, 5, head=lambda: (torch.cat([W, W, W[:1]]), torch.zeros(9)))
    some.update(H, Y)                                                         # five classes never occur
    agrees(some.compute(), direct()); assert some.compute()["classes"] == 4
    with pytest.raises(ValueError, match="labels run"): metric.update(H, Y + 1)
    with pytest.raises(ValueError, match="features have shape"): metric.update(H[:, :3], Y)


def _process(rank, folder):
    from nc_nbdev.lab.integrations import CollapseMetric
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = CollapseMetric(4, 5, head=head)
    metric.update(H[rank::2], Y[rank::2])
    agrees(metric.compute(), direct())                                        # torchmetrics synchronises
    dist.destroy_process_group()


def test_metric_over_processes(tmp_path): mp.spawn(_process, (str(tmp_path),), nprocs=2)
