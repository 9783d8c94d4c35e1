"Runs on the workers of a cluster, and one measure over several processes."

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nc_nbdev.lab.many_machines import together
from nc_nbdev.lab.report import collect, compare_splits

K = 3


def problem():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(K, (101,), generator=g)
    return torch.randn(101, 5, generator=g) + 2 * torch.eye(K, 5)[y], y


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, K))


def report(model, X, y, join, absent="error"):
    "Of one process's share."
    inner = getattr(model, "module", model)
    counts = problem()[1].bincount() if absent == "error" else None
    options = dict(layers=["1"], num_classes=K, keep=(), head="2", class_counts=counts, absent=absent)
    dl = list(zip(X.split(16), y.split(16), strict=True))
    train = join(collect(model, dl, **options))
    test = join(collect(model, dl, **options, reference=train.statistics, classes=train.classes))
    return compare_splits(train, {"test": test}, head=(inner[2].weight.detach(), inner[2].bias.detach()))


def twice(split):
    "The second time, which finds the share as it was."
    together(split)
    return together(split)


def shares(y):
    "Samples of two processes of which one at least lacks a class; in the last case both lack class 1."
    even = torch.arange(len(y)) % 2 == 0
    first, fewer, others = (y == 0) | (y == 1) & even, (y < 2) & even, y != 1
    return {"as many": (first, ~first), "fewer": (fewer, ~fewer), "none": (others & even, others & ~even)}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        X, y = problem()
        share = slice(0, 83) if rank == 0 else slice(83, None)
        model = nn.parallel.DistributedDataParallel(network())
        first = report(model, X[share], y[share], together)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):   # each process has its own samples, and the same weights
            nn.functional.cross_entropy(model(X[share]), y[share]).backward()
            optimiser.step(); optimiser.zero_grad()
        trained = report(model, X[share], y[share], together)
        lacking = {name: report(network(), X[parts[rank]], y[parts[rank]], twice, "leave out")
                   for name, parts in shares(y).items()}
        try: together(collect(network(), [(X, y)], "1", K + rank, keep=(), absent="leave out")); said = ""
        except ValueError as error: said = str(error)
        torch.save({"said": said, "lacking": {name: found.frame.value.tolist() for name, found in lacking.items()},
                    "first": first.frame.value.tolist(), "trained": trained.frame.value.tolist(),
                    "weights": model.module.state_dict()}, f"{folder}/{rank}.pt")
    finally: dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_a_measure_of_two_uneven_shares_is_that_of_one_process(tmp_path):
    mp.spawn(work, args=(tmp_path,), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("first", "trained"):
        assert one[name] == other[name]
        model = network()
        if name == "trained": model.load_state_dict(one["weights"])
        alone = report(model, *problem(), lambda split: split)
        assert one[name] == pytest.approx(alone.frame.value.tolist(), rel=1e-6, abs=1e-9)
    assert one["first"] != one["trained"]
    X, y = problem()
    for name, parts in shares(y).items():
        alone = report(network(), X[sum(parts) > 0], y[sum(parts) > 0], lambda split: split, "leave out")
        assert one["lacking"][name] == other["lacking"][name], name
        assert one["lacking"][name] == pytest.approx(alone.frame.value.tolist(), rel=1e-6, abs=1e-9), name
    assert one["said"] == other["said"] == "num_classes is [3, 4] in the processes: expected the same in all"


def test_kept_features_are_not_added_up():
    X, y = problem()
    with pytest.raises(ValueError, match="keep="): together(collect(network(), [(X, y)], "1", K, keep=("1",)))


def half(x):
    if x % 2: raise ValueError(f"{x} is odd")
    return x // 2, os.getpid(), torch.get_num_threads()


def test_workers_of_a_cluster():
    from nc_nbdev.lab.runs import parallel, workers  # with fastai, which the processes above do without
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with workers(scheduler=cluster.scheduler_address):
            first = parallel([(half, 2 * i) for i in range(6)], "halving", progress=False)
            again = parallel([(half, 2 * i) for i in range(6)], "halving", progress=False)
            with pytest.raises(RuntimeError, match=r"1 of 3 failed.*\n.*\(7,\).*7 is odd"):
                parallel([(half, x) for x in (2, 7, 4)], "halving", progress=False)
    assert [x for x, _, _ in first] == list(range(6))
    places = {pid for _, pid, _ in first + again}
    assert len(places) == 2 and os.getpid() not in places, "two processes, started once"
    assert {threads for _, _, threads in first} == {1}


def test_no_worker_is_refused():
    from nc_nbdev.lab.runs import workers
    with pytest.raises(ValueError, match="at least 1"), workers(0): pass
