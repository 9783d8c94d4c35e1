"""Neighbours: recipes by plain steps, exact minima, regression without classes, losses on a model of someone else."""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from scipy.optimize import minimize_scalar
from torch import nn

import nc_nbdev as nc
from nc_nbdev.geometry.etf import simplex_etf
from nc_nbdev.geometry.means import nc2_etf
from nc_nbdev.geometry.regression import RegressionStatistics, nrc1, nrc2, nrc3
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.geometry.variability import nc1_trace
from nc_nbdev.lab.regression import compare_reports, measure_regression
from nc_nbdev.lab.runs import get_run
from nc_nbdev.lab.settings import Settings
from nc_nbdev.neighbours.apparatus import SystemRecipe, collapse_ratio, relu_network
from nc_nbdev.neighbours.feature_collapse import ConceptTask, one_example_accuracy
from nc_nbdev.neighbours.long_tailed import DotRegressionLoss, FixedSimplexHead, LongTailed, NCRegulariser
from nc_nbdev.neighbours.regression import RegressionTask, _unexplained, minimise_regression, regression_minimum


def blobs(n=60, K=3, dim=8, spread=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    return 2 * torch.randn(K, dim, generator=g)[y] + spread * torch.randn(n, dim, generator=g), y


@dataclass(frozen=True)
class Blobs(SystemRecipe):
    epochs: int = 4
    steps: int = 5
    batch_size: int = 16
    weight_decay: float = 1e-2

    def tensors(self, data_dir=None): return {"train": blobs(), "test": blobs(seed=1)}
    def network(self): return relu_network(8, 16, 3)


# -- the frame ---------------------------------------------------------------------------------------------------------

def by_hand(recipe):
    model = recipe.learner().model
    optimiser = recipe.optimiser()(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    train = recipe.tensors()["train"]
    for epoch in range(recipe.epochs):
        for step, batch in enumerate(recipe.batches(train, epoch)):
            optimiser.param_groups[0]["lr"] = recipe.rate((epoch + step / recipe.steps) / recipe.epochs)
            optimiser.zero_grad()
            recipe.loss(model, *batch).backward()
            optimiser.step()
    return model


@pytest.mark.parametrize("batch_size", [16, 0])
def test_a_run_is_a_plain_loop(tmp_path, batch_size):
    recipe = Blobs(batch_size=batch_size)
    run = get_run(recipe, Settings(runs_dir=tmp_path, device="cpu"), progress=False)
    for p, q in zip(run.model().parameters(), by_hand(recipe).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    at_end = run.history.query("epoch == 4 and split == 'test'").set_index("measure").value
    X, y = blobs(seed=1)
    assert at_end["accuracy"] == pytest.approx((run.model()(X).argmax(1) == y).double().mean().item())


def test_batches_are_passes_in_an_order_of_their_own():
    recipe, train = Blobs(steps=3, batch_size=20), blobs()
    seen = torch.cat([x for x, _ in recipe.batches(train, 0)])
    assert sorted(seen[:, 0].tolist()) == sorted(train[0][:, 0].tolist())
    assert not torch.equal(seen, torch.cat([x for x, _ in recipe.batches(train, 1)]))
    assert not torch.equal(seen, torch.cat([x for x, _ in replace(recipe, seed=1).batches(train, 0)]))


def test_collapse_ratio_is_nc1_with_a_gradient():
    H, y = blobs()
    H.requires_grad_()
    assert collapse_ratio(H, y, 3).item() == pytest.approx(
        nc1_trace(ClassStatistics.from_features(H.detach(), y, num_classes=3)), rel=1e-4)
    assert collapse_ratio(H, y, 5).item() == pytest.approx(collapse_ratio(H, y, 3).item(), rel=1e-5)   # absent classes
    loss = collapse_ratio(H, y, 3)
    step = H - 1e-2 * torch.autograd.grad(loss, H)[0]
    assert collapse_ratio(step, y, 3) < loss


# -- feature collapse --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("zipf,layer_norm", [(False, False), (True, False), (True, True)])
def test_predicted_lengths_are_stationary_for_the_whole_population(zipf, layer_norm):
    "All sentences of all patterns, each with its probability: the gradient of the exact loss vanishes at the formula."
    task = ConceptTask(concepts=3, synonyms=2, length=2, classes=9, per_class=0, dim=4, decay=2e-2, zipf=zipf,
                       layer_norm=layer_norm)
    x, u = task.predicted_lengths()
    assert u > 0.1 and x.min() > 0.1
    f = simplex_etf(3, 4, seed=2)
    if layer_norm: f = F.layer_norm(simplex_etf(3, 4), (4,)) * 0 + _centred_simplex()
    H = (f[:, None] * torch.from_numpy(x)[None, :, None]).reshape(6, 4)
    H = H.requires_grad_()
    patterns = task.patterns()
    W = (u * f[patterns]).reshape(9, 8).clone().requires_grad_()
    share, loss = task.frequencies().double(), 0
    for words in product(range(2), repeat=2):
        sentences = patterns * 2 + torch.tensor(words)
        vectors = F.layer_norm(H, (4,), eps=0) if layer_norm else H
        loss = loss + share[list(words)].prod() * F.cross_entropy(vectors[sentences].flatten(1) @ W.T, torch.arange(9))
    loss = loss + task.decay / 2 * (W.square().sum() + (0 if layer_norm else H.square().sum()))
    for g in torch.autograd.grad(loss, (H, W)): assert g.abs().max() < 1e-6


def _centred_simplex():
    "Three unit vectors on a simplex whose entries sum to zero, as LayerNorm leaves them."
    basis = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.eye(4)[:, :2]], 1).double()).Q[:, 1:]      # (4, 2)
    angles = torch.arange(3).double() * 2 * torch.pi / 3
    return torch.stack([angles.cos(), angles.sin()], 1) @ basis.T


def test_too_much_decay_leaves_nothing():
    task = ConceptTask(concepts=3, synonyms=2, length=2, classes=9, zipf=False)
    limit = (2 / (6 * 9)) ** 0.5
    assert task.__class__(**{**vars(task), "decay": 0.9 * limit}).predicted_lengths()[1] > 1e-2
    assert abs(task.__class__(**{**vars(task), "decay": 1.1 * limit}).predicted_lengths()[1]) < 1e-5
    with pytest.raises(ValueError, match="expected all 9 patterns"): replace(task, classes=8).predicted_lengths()


def test_collapsed_words_serve_a_new_task():
    task = ConceptTask(synonyms=20, length=6, classes=50)
    model = task.network()
    scattered = one_example_accuracy(model, task)
    with torch.no_grad(): model.vectors.copy_(simplex_etf(3, 16).repeat_interleave(20, 0))
    assert one_example_accuracy(model, task) == 1 > scattered


# -- regression: exact -------------------------------------------------------------------------------------------------

def targets(N=150, seed=0):
    mix = torch.tensor([[1.0, 0, 0], [0.7, 0.5, 0], [-0.2, 0.3, 0.6]])
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(seed)) @ mix.T + torch.tensor([1.0, -2, 3])


@pytest.mark.parametrize("kept,ratio", [(3, 1.0), (3, 4.0), (2, 1.0), (1, 0.5), (0, 1.0)])
def test_free_features_end_at_the_soft_threshold(kept, ratio):
    Y = targets()
    variances = torch.linalg.eigvalsh(torch.cov(Y.double().T, correction=0)).flip(0)
    c = [variances[0] * 1.3, (variances[0] * variances[1]) ** 0.5, (variances[1] * variances[2]) ** 0.5,
         variances[2] / 9][kept].item()
    lh, lw = (c * ratio) ** 0.5, (c / ratio) ** 0.5
    expected = regression_minimum(Y, lh, lw)
    W, H = minimise_regression(Y, 6, lh, lw, seed=3)
    assert torch.linalg.matrix_rank(expected, atol=1e-8) == kept
    torch.testing.assert_close(W @ W.T, expected, rtol=1e-5, atol=1e-6)
    if kept == 3:
        stats = RegressionStatistics.from_features(H, Y)
        assert max(nrc1(stats), nrc2(W, stats), nrc3(W, stats)) < 1e-6


def test_without_decay_nothing_collapses():
    W, H = minimise_regression(targets(), 6, 0.0, 0.0)
    assert nrc1(RegressionStatistics.from_features(H, targets())) > 0.01


# -- regression: measures ----------------------------------------------------------------------------------------------

def pair(N=200, D=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    Y = targets(N, seed)
    return Y @ torch.randn(3, D, generator=g) + 0.3 * torch.randn(N, D, generator=g), Y, torch.randn(3, D, generator=g)


def test_stream_is_one_shot_and_parts_add_up():
    H, Y, W = pair()
    whole, centre = RegressionStatistics.from_features(H, Y), H.double().mean(0)
    stream = RegressionStatistics(7, 3, centre)
    for h, y in zip(H.split(33), Y.split(33), strict=True): stream.update(h, y)
    parts = RegressionStatistics(7, 3, centre)
    for h, y in zip(H.split(70), Y.split(70), strict=True): parts += RegressionStatistics(7, 3, centre).update(h, y)
    for other in (stream, parts):
        assert other.count == whole.count
        torch.testing.assert_close(other.feature_covariance, whole.feature_covariance, rtol=1e-10, atol=1e-12)
        assert nrc1(other) == pytest.approx(nrc1(whole), rel=1e-9)
        assert nrc3(W, other) == pytest.approx(nrc3(W, whole), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("weighting", ["sample", "variance"])
def test_what_leaves_the_measures_alone(weighting):
    "Shifts, rotations and a scale of the features, with the last layer in step."
    H, Y, W = pair()
    H, W = H.double(), W.double()
    Q = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    a, b = (RegressionStatistics.from_features(h, Y) for h in (H, 3 * H @ Q + 5))
    assert nrc1(b, weighting) == pytest.approx(nrc1(a, weighting), rel=1e-8)
    assert nrc2(W @ Q, b, weighting) == pytest.approx(nrc2(W, a, weighting), rel=1e-8)
    assert nrc3(2 * W @ Q, b) == pytest.approx(nrc3(W, a), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_nrc3_is_the_minimum_over_gamma(seed):
    _, Y, W = pair(seed=seed)
    stats = RegressionStatistics.from_features(pair()[0], Y)
    values, Q = torch.linalg.eigh(stats.target_covariance)
    A = W.double() @ W.double().T

    def distance(c):
        R = (Q * (values.sqrt() - c)) @ Q.T
        return (A / A.norm() - R / R.norm()).square().sum().item()

    top = values[0].sqrt().item()
    inner = minimize_scalar(distance, bounds=(0, top), method="bounded", options=dict(xatol=1e-10)).fun
    slow = min(inner, distance(0.0))
    assert nrc3(W, stats) == pytest.approx(slow, abs=1e-6)


def test_bad_input_to_regression():
    H, Y, W = pair()
    stats = RegressionStatistics(7, 3)
    with pytest.raises(ValueError, match="expected"): stats.update(H[:, :5], Y)
    with pytest.raises(ValueError, match="a row a sample"): stats.update(H, Y[:, :2])
    with pytest.raises(ValueError, match="NaN"): stats.update(H * float("nan"), Y)
    assert stats.count == 0
    with pytest.raises(ValueError, match="no samples"): nrc1(stats, "variance")
    stats.update(H, Y)
    with pytest.raises(ValueError, match="needs a centre"): nrc1(stats)
    with pytest.raises(ValueError, match="weighting"): nrc1(stats, "class")
    with pytest.raises(ValueError, match="shape"): nrc2(W[:2], stats)
    with pytest.raises(ValueError, match="D >= n"): nrc1(RegressionStatistics.from_features(H[:, :2], Y), "variance")
    with pytest.raises(ValueError, match="merge"): stats + RegressionStatistics(6, 3)


def regression_model(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, outputs))


@pytest.mark.parametrize("columns", [3, 1, 0])
def test_measure_takes_a_regression_model(columns):
    "Targets (B, 3), (B, 1) and (B,); a network of someone else."
    H, Y, _ = pair()
    Y = Y[:, 0] if columns == 0 else Y[:, :columns]
    model, batches = regression_model(columns or 1), list(zip(H.split(64), Y.split(64), strict=True))
    report = nc.measure(model, batches, batches[:2])
    with torch.no_grad(): last = model[:-1](H)
    found = report.frame.set_index(["split", "layer", "measure"]).value
    stats = RegressionStatistics.from_features(last, Y)
    assert found["train", report.layers[-1], "nrc1"] == pytest.approx(nrc1(stats), rel=1e-5)
    assert found["train", report.layers[-1], "nrc2"] == pytest.approx(nrc2(model[-1].weight, stats), rel=1e-5)
    error = (model(H).reshape(Y.shape) - Y).square().reshape(len(Y), -1).sum(1).mean().item()
    assert found["train", "output", "mse"] == pytest.approx(error, rel=1e-5)
    assert ("test", report.layers[-1], "nrc1") in found.index and "targets" in repr(report)


@pytest.mark.parametrize("labels", [torch.arange(200).float() % 3, F.one_hot(torch.arange(200) % 3).float()])
def test_classes_as_floats_are_still_refused(labels):
    with pytest.raises(ValueError): nc.measure(regression_model(3), [(pair()[0], labels)])


def test_recorder_on_a_regression_learner():
    H, Y, _ = pair()
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(H, Y), 50)
    learn = Learner(DataLoaders(dl, dl), regression_model(3), nn.MSELoss(), lr=1e-2, cbs=nc.CollapseRecorder())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    rows = learn.collapse_recorder.history
    assert sorted(rows[rows.measure == "nrc1"].epoch.unique()) == [0, 1, 2]


def test_regression_of_a_network_without_a_last_layer():
    H, Y, _ = pair()
    report = measure_regression(regression_model(3), [(H, Y)], head=None)
    assert "no last layer" in report.notes[0] and "nrc2" not in set(report.frame.measure)


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_a_dead_layer_or_equal_targets_cost_their_numbers_only(bias):
    "What follows a dead layer is constant, too: equal but for rounding."
    H, Y, _ = pair()
    model, count = regression_model(3), lambda report: report.frame.groupby("measure").size().to_dict()
    full = count(nc.measure(model, [(H, Y)], [(H, Y)]))
    equal = nc.measure(model, [(H, Y)], [(H, 0 * Y + bias)])
    assert count(equal) == full | {"r2": 1} and equal.notes == ("test set, layer output: no r2, all targets are equal",)
    report = measure_regression(model, [(H, 0 * Y + bias)])
    assert "nrc1" in count(report) and not {"r2", "nrc3"} & set(count(report)) and len(report.notes) == 2
    model[2].load_state_dict(dict(weight=0 * model[2].weight, bias=torch.full((10,), bias)))
    report = nc.measure(model, [(H, Y)], [(H, Y)])
    last, kept = report.layers[-1], report.frame.set_index("layer").measure
    assert f"test set, layer {last}: no nrc1, noise, nrc2, all features are equal" in "".join(report.notes)
    assert {"nrc1", "r2", "nrc3"} <= set(kept) and list(kept[[last]]) == ["nrc3"]


def test_digit_targets_have_rank_two():
    tensors = RegressionTask(dataset="digits").tensors()
    values = torch.linalg.eigvalsh(torch.cov(tensors["train"][1].double().T))
    assert values[0] < 1e-6 < 0.1 < values[1]


# -- long tails: losses and heads on a model of someone else -----------------------------------------------------------

class Theirs(nn.Module):
    "A convolutional network that knows nothing of this package."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x): return self.fc(self.stem(x))


def images(counts=(60, 30, 10, 3)):
    g = torch.Generator().manual_seed(0)
    y = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    return torch.randn(4, 1, 8, 8, generator=g)[y] + 1.2 * torch.randn(len(y), 1, 8, 8, generator=g), y


def trained(penalty=None, head=None, dot=False, steps=60):
    torch.manual_seed(0)
    model, (x, y) = Theirs(), images()
    if head: model.fc = head
    loss = DotRegressionLoss(model.fc.weight) if dot else None
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        H = model.stem(x)
        value = loss(H, y) if dot else F.cross_entropy(model.fc(H), y) + (penalty(H, y) if penalty else 0)
        sgd.zero_grad(); value.backward(); sgd.step()
    with torch.no_grad(): return model.eval(), ClassStatistics.from_features(model.stem(x), y, num_classes=4)


def test_regulariser_tightens_and_parts_classes():
    plain, ours = trained()[1], trained(NCRegulariser(4, 16, within=0.1, between=0.5))[1]
    assert nc1_trace(ours) < nc1_trace(plain)
    assert nc2_etf(ours) < nc2_etf(plain)


def test_regulariser_is_least_at_the_simplex():
    frame, y = simplex_etf(4, 16).float(), torch.arange(40) % 4
    penalty = NCRegulariser(4, 16)
    least = penalty(frame[y], y).item()
    assert least == pytest.approx(-0.1 * np.arccos(-1 / 3), rel=1e-4)
    for seed in range(10):
        other = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)))[y]
        assert NCRegulariser(4, 16)(other, y).item() > least


def test_regulariser_remembers_absent_classes():
    penalty, frame = NCRegulariser(4, 16), simplex_etf(4, 16).float()
    assert penalty(frame[:1], torch.tensor([0])).item() == 0                  # one class has no neighbour
    y = torch.arange(4)
    penalty(frame[y], y)
    H = frame[:2].clone().requires_grad_()
    value = penalty(H, y[:2])                                                 # classes 2 and 3 by their running means
    assert value.item() == pytest.approx(-0.1 * np.arccos(-1 / 3), rel=1e-3)
    value.backward()
    assert H.grad.isfinite().all()
    copy = NCRegulariser(4, 16)
    copy.load_state_dict(penalty.state_dict())
    assert copy.eval()(frame[:2], y[:2]).item() == pytest.approx(penalty.eval()(frame[:2], y[:2]).item())
    with pytest.raises(ValueError, match="expected"): penalty(torch.randn(4, 5), y)
    with pytest.raises(ValueError, match="at least 2"): NCRegulariser(1, 5)


def test_fixed_head_stays_and_is_found_by_measure():
    head = FixedSimplexHead(16, 4)
    before = head.weight.clone()
    model, stats = trained(head=head)
    assert torch.equal(model.fc.weight, before)
    x, y = images()
    report = nc.measure(model, [(x, y)], layers=("stem",))
    assert report.measures["train"]["stem"].nc3_duality is not None
    assert nc2_etf(stats) < nc2_etf(trained()[1])


def test_dot_regression_on_their_model():
    model, stats = trained(head=FixedSimplexHead(16, 4), dot=True, steps=120)
    x, y = images()
    H = F.normalize(model.stem(x), dim=1)
    assert (model.fc(H).argmax(1) == y).double().mean() > 0.9
    loss = DotRegressionLoss(model.fc.weight)
    assert loss(H, y).item() == pytest.approx(loss(7 * H, y).item(), rel=1e-5)      # of directions only


def test_methods_of_the_long_tailed_study_train():
    for method in ("regularised", "simplex", "dot"):
        recipe = LongTailed(method=method, epochs=1, steps=2)
        model = by_hand(recipe)
        rows = dict(((s, m), v) for s, _, m, v in recipe.measures(model, recipe.tensors()))
        assert 0 <= rows["test", "balanced_accuracy"] <= 1 and ("train", "nc2_etf") in rows


@pytest.mark.parametrize("shape, says", [((50,), r"b\[1\].long\(\)\);"), ((50, 1), r"b\[1\].long\(\).squeeze\(1\)\);"),
                                         ((50, 2), "one a sample;")])
def test_whole_numbers_may_be_numbers_or_classes(shape, says):
    "The error says what to call; a fraction in any batch decides, whichever batch comes first."
    X, Y = torch.randn(50, 7), torch.randint(2, 9, shape).float()
    model, batches = regression_model((*shape, 1)[1]), lambda Y: [*zip(X.split(16), Y.split(16), strict=True)]
    with pytest.raises(ValueError, match=f"^labels are .* integers .*{says}.* call measure_regression"):
        nc.measure(model, batches(Y))
    assert measure_regression(model, batches(Y)).num_targets == (*shape, 1)[1]
    Y[20] += 0.5
    for order in (1, -1): assert nc.measure(model, batches(Y)[::order]).num_targets == (*shape, 1)[1]


def test_a_report_on_regression_is_compared_escaped_and_says_what_it_lacks():
    X, Y = torch.randn(50, 6), torch.randn(50, 2)
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))
    report, same = (measure_regression(model, [(X, Y)], [(X, Y)]) for _ in range(2))
    assert report == same and report != measure_regression(model, [(X, Y)]) and report != 3
    assert "No NRC1 of layer 0: fewer features than the 2 targets." in report.notes and len(report.notes) == 1
    ratios = report.compare(same)
    assert len(ratios) == len(report.frame) and ratios.this.equals(ratios.other)
    assert ratios.equals(compare_reports(report, same))
    html = replace(report, notes=("<script>x</script>",))._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    with pytest.raises(ValueError, match="train_dl is a generator, which can be read once"):
        measure_regression(model, (batch for batch in [(X, Y)]))


# --- halves, single classes, frozen heads


def test_collapse_ratio_of_one_class_is_refused_and_halves_do_not_overflow():
    H, y = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    with pytest.raises(ValueError, match="two or more"): collapse_ratio(H, y * 0, 2)
    half = (20 * H).half().requires_grad_()
    found = collapse_ratio(half, y, 2)
    found.backward()
    assert found.item() == pytest.approx(collapse_ratio(20 * H, y, 2).item(), rel=1e-2)
    assert half.grad.isfinite().all()


def test_regulariser_before_training_with_new_classes_and_with_halves():
    frame, y = simplex_etf(4, 16).float(), torch.arange(40) % 4
    H = frame[y] + 0.1 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    least = NCRegulariser(4, 16)(H, y).item()
    assert NCRegulariser(4, 16).eval()(H, y).item() == pytest.approx(least)
    penalty = NCRegulariser(4, 16)
    penalty(H[y < 3], y[y < 3])
    assert penalty.eval()(H, y).item() == pytest.approx(least, rel=1e-3)       # class 3 is new
    far, y = (frame + 500).repeat(100, 1), torch.arange(400) % 4               # sums of a class are beyond halves
    for half in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", half): mixed = NCRegulariser(4, 16)(far, y)
        assert mixed.item() == pytest.approx(NCRegulariser(4, 16)(far, y).item(), rel=1e-3)
    assert NCRegulariser(4, 16)(far.half(), y % 2).isfinite()


def test_a_fixed_head_is_reset_to_its_simplex():
    head = FixedSimplexHead(16, 4, scale=3.0, seed=1)
    before = head.weight.clone()
    with torch.no_grad(): head.weight.zero_()
    head.reset_parameters()
    assert torch.equal(head.weight, before) and not head.weight.requires_grad
    assert torch.allclose(before.norm(dim=1), torch.full((4,), 3.0))


def test_regression_minimum_needs_decay_and_a_dropped_direction_is_seen():
    Y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="lw"): regression_minimum(Y, 0.1, 0.0)
    with pytest.raises(ValueError, match="lh"): regression_minimum(Y, -0.1, 0.1)
    _, Q = torch.linalg.eigh(torch.cov(Y.T))
    assert _unexplained(Y, Y) == pytest.approx(0, abs=1e-6)
    assert _unexplained(Y @ Q[:, 1:] @ Q[:, 1:].T, Y) == pytest.approx(1, rel=1e-5)
    flat = Y[:, [0, 1, 1]]                                                    # two directions
    assert _unexplained(0.5 * flat, flat) == pytest.approx(0.25, rel=1e-5)
