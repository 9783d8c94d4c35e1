"""Graphs, language models, features at convergence and grokking: exact results, against independent computations."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nc_nbdev as nc
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.geometry.variability import cdnv, nc1_trace
from nc_nbdev.lab.runs import get_run
from nc_nbdev.lab.settings import get_settings
from nc_nbdev.neighbours import convergence as co
from nc_nbdev.neighbours import graphs as gr
from nc_nbdev.neighbours import grokking as gk
from nc_nbdev.neighbours import language_models as lm
from nc_nbdev.theory.free_features import FreeFeatures, Problem, minimise

quick = settings(max_examples=15, deadline=None)


def labels(K, n): return torch.arange(K).repeat_interleave(n)


# --- graphs


CASES = [(2, 6, 2, 0.1), (3, 4, 1, 0.2), (3, 2, 5, 0.15), (4, 0, 3, 0.1)]


@pytest.mark.parametrize("K, inside, outside, strength", CASES)
def test_free_features_on_regular_graphs_reach_the_closed_form(K, inside, outside, strength):
    n, y = 20, labels(K, 20)
    graphs = [gr.regular_graph(y, inside, outside, seed=s) for s in (100, 101)]
    shares = torch.full((K, K), float(outside)).fill_diagonal_(inside).double() / (inside + (K - 1) * outside)
    a, loss = gr.graph_minimum(shares, strength)
    H, Z, found = gr.free_graph_features(graphs, y, strength, dim=K + 2, seed=100)
    assert found == pytest.approx(loss, rel=1e-8)
    for z in Z: torch.testing.assert_close(torch.linalg.svdvals(z) / math.sqrt(n), a, rtol=0, atol=1e-5)
    for h in H: assert nc1_trace(ClassStatistics.from_features(h, y, num_classes=K)) < 1e-9


def test_the_directions_of_a_graph_vanish_at_their_thresholds():
    S = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).double() / 4  # s = 1 and 1/2
    just = lambda s, factor: gr.graph_minimum(S, factor * math.sqrt(1 + s**2) / 2)[0]
    assert just(0.5, 1.001)[1] == 0 < just(0.5, 0.999)[1] and just(0.5, 1.001)[0] > 0
    assert just(1, 1.001)[0] == 0 < just(1, 0.999)[0]


def test_random_graphs_do_not_collapse():
    y = labels(2, 50)
    H, _, _ = gr.free_graph_features([gr.block_graph(y, 0.2, 0.03, seed=s) for s in (100, 101)], y, seed=100)
    assert all(nc1_trace(ClassStatistics.from_features(h, y, num_classes=2)) > 1e-4 for h in H)


@quick
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 9), st.data())
def test_regular_graphs_are_regular(seed, K, n, data):
    inside, outside = 2 * data.draw(st.integers(0, (n - 1) // 2)), data.draw(st.integers(0, n))
    y = labels(K, n)[torch.randperm(K * n, generator=torch.Generator().manual_seed(seed))]
    edges = gr.regular_graph(y, inside, outside, seed)
    A = torch.zeros(K * n, K * n).index_put((*edges,), torch.ones(()), accumulate=True)
    A = A + A.T
    assert A.max() <= 1 and not A.diagonal().any()
    expected = torch.where(y[:, None] == torch.arange(K), float(inside), float(outside))
    torch.testing.assert_close(A @ F.one_hot(y, K).float(), expected)


def test_regular_graphs_are_mixed_and_not_rings():
    "The third eigenvalue of a ring with random shifts is far from that of a random regular graph."
    y = labels(2, 100)
    for seed in range(3):
        edges = gr.regular_graph(y, 12, 2, seed)
        A = torch.zeros(200, 200, dtype=torch.float64).index_put((*edges,), torch.ones((), dtype=torch.float64))
        assert torch.linalg.eigvalsh((A + A.T) / 14)[-3] < 0.6


def test_shares_that_are_not_symmetric_are_refused():
    with pytest.raises(ValueError, match="symmetric"): gr.graph_minimum(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), 0.1)


@quick
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_the_sparse_mean_is_the_dense_one(seed, p, q):
    y = labels(2, 8)
    edges = gr.block_graph(y, p, q, seed)
    A = torch.zeros(16, 16).index_put((*torch.cat([edges, edges.flip(0)], 1),), torch.ones(())).double()
    H = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(gr.neighbour_mean(H, edges), A @ H / A.sum(1, keepdim=True).clamp(min=1))


def test_the_names_of_communities_do_not_matter():
    g = torch.Generator().manual_seed(0)
    Z, y = torch.randn(30, 3, generator=g), labels(3, 10)
    error, accuracy = gr.named_error(Z, y)
    for names in ([1, 2, 0], [2, 1, 0]):
        other, same = gr.named_error(Z[:, names], y)
        assert other == pytest.approx(error) and same == accuracy
    assert error <= (Z - F.one_hot(y)).square().sum(1).mean()


def test_a_graph_recipe_trains_and_measures(tmp_path):
    recipe = gr.CommunityGraphs(nodes=60, inside=8, outside=1, depth=2, graphs=3, test_graphs=2, epochs=2, steps=3)
    run = get_run(recipe, get_settings(tmp_path, runs_dir=tmp_path, device="cpu"), progress=False)
    found = run.history[(run.history.epoch == 2) & (run.history.split == "test")]
    assert set(found.layer) == {"output", "layer 0", "layer 1", "layer 2"}
    parts = run.loaders()["test"][0]
    by_hand = [run.model().features(*gr._graph(parts, k)[:2])[2].detach() for k in range(2)]
    expected = np.exp(np.mean([math.log(nc1_trace(ClassStatistics.from_features(H, parts[-1], num_classes=2)))
                               for H in by_hand]))
    assert found[found.layer == "layer 2"].value.item() == pytest.approx(expected, rel=1e-5)


def test_the_layer_is_that_of_pytorch_geometric_and_its_models_can_be_measured():
    geometric = pytest.importorskip("torch_geometric")
    from torch_geometric.nn import GraphConv, Sequential

    y, g = labels(2, 20), torch.Generator().manual_seed(0)
    edges, x = gr.block_graph(y, 0.3, 0.05, seed=100), torch.randn(40, 4, generator=g)
    both, ours, theirs = torch.cat([edges, edges.flip(0)], 1), gr.GraphLayer(4, 4), GraphConv(4, 4, "mean", bias=False)
    theirs.lin_root.weight.data, theirs.lin_rel.weight.data = ours.own.weight.data, ours.mean.weight.data
    torch.testing.assert_close(theirs(x, both), ours(x, edges), rtol=1e-4, atol=1e-5)

    model = Sequential("x, edge_index", [(theirs, "x, edge_index -> x"), nn.ReLU(inplace=False), nn.Linear(4, 2)])
    loader = geometric.loader.DataLoader([geometric.data.Data(x=x, edge_index=both, y=y)])
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU))
    report = nc.measure(model, loader, layers=[name], batch=lambda d: ((d.x, d.edge_index), d.y))
    direct = ClassStatistics.from_features(theirs(x, both).relu(), y, num_classes=2)
    assert report.measures["train"][name].nc1_trace == pytest.approx(nc1_trace(direct), rel=1e-5)


# --- language models


def test_a_language_has_its_words_and_phrases():
    text = lm.markov_language(400, 40, seed=100, words=60, categories=6)
    assert text.min() >= 0 and text.max() < 60 and text.shape == (400, 40)
    pairs = (text[:, :-1] * 6 + text[:, 1:] % 6).flatten()  # the word before, and the category of the next
    following = torch.zeros(360, 60).index_put((pairs, text[:, 1:].flatten()), torch.ones(()), accumulate=True)
    often = following[following.sum(1) >= 50]
    assert (often.max(1).values / often.sum(1)).median() > 0.5  # 0.6 by the phrase, and some by chance


@quick
@given(st.integers(0, 10**6), st.integers(1, 64))
def test_measures_of_a_vocabulary_do_not_depend_on_the_batches(seed, size):
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([labels(6, 12), torch.tensor([6, 6])])[torch.randperm(74, generator=g)]  # word 6 is rare
    H, W = torch.randn(74, 5, generator=g), torch.randn(8, 5, generator=g)
    found = lm.vocabulary_measures(lambda x: x, W, H, y, batch_size=size)
    stats = ClassStatistics.from_features(H[y < 6], y[y < 6], num_classes=6)
    nearest = torch.cdist(H[y < 6].double(), stats.means).argmin(1)
    assert found["classes"] == 6
    assert found["cdnv"] == pytest.approx(cdnv(stats), rel=1e-6)
    assert found["nc4_agreement"] == pytest.approx((nearest == (H[y < 6] @ W[:6].T).argmax(1)).float().mean().item())
    M = stats.centred_means().numpy()
    unit = M / np.linalg.norm(M, axis=1, keepdims=True)
    logs = [math.log(np.linalg.norm(unit[i] - unit[j])) for i in range(6) for j in range(i)]
    assert found["uniformity_dispersion"] == pytest.approx(np.std(logs) / abs(np.mean(logs)), rel=1e-6)


def test_the_shuffled_corpus_has_the_same_words():
    language, shuffled = (lm.SmallLanguageModel(streams=10, length=20, shuffled=s) for s in (False, True))
    text = [torch.cat([t["test"][1], t["train"][1]]) for t in (language.tensors(None), shuffled.tensors(None))]
    assert len(text[0]) == len(text[1]) == 160 and (text[0] != text[1]).any()


# --- features at convergence


def test_the_equation_is_the_sum_over_samples_in_every_layer():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6).double(), labels(4, 10)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    sides = co.feature_equation(model, F.cross_entropy(model(x), y), decay=0.3)
    assert list(sides) == ["0.weight", "2.weight", "4.weight"]
    for k in (0, 2, 4):
        h = model[:k](x).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model[k:](h), y, reduction="sum"), h)
        left, right = sides[f"{k}.weight"]
        torch.testing.assert_close(right, -(g.T @ h.detach()) / (40 * 0.3))
        torch.testing.assert_close(left, model[k].weight.detach().T @ model[k].weight.detach())


def test_the_equation_holds_at_rest():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5).double(), labels(3, 10)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=2000, tolerance_grad=1e-11, tolerance_change=0,
                              line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.005 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    lbfgs.step(objective)
    for left, right in co.feature_equation(model, F.cross_entropy(model(x), y), decay=0.01).values():
        assert (left - right).norm() < 1e-6 * left.norm()
    with pytest.raises(ValueError, match="positive"): co.feature_equation(model, objective(), decay=0)


def test_the_factor_of_duality_is_exact_for_free_features():
    problem = Problem(num_classes=4, dim=6, per_class=3, lw=0.01, lh=0.01 / 12, lb=math.inf, loss="ce")
    model = FreeFeatures(problem, seed=0)
    minimise(model)
    W, H = model.W.detach(), model.H.detach()
    assert co.duality_error(W, H, model.y, problem.lw) < 1e-4
    assert co.duality_error(W, H, model.y, 2 * problem.lw) > 0.4


@quick
@given(st.integers(0, 10**6))
def test_gradient_products_are_those_of_jacobians(seed):
    torch.manual_seed(seed)
    x = torch.randn(6, 4).double()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = co.gradient_products(model, x)
    for k, name in ((0, "0.weight"), (2, "2.weight")):
        h = model[:k](x).detach()
        J = torch.stack([torch.autograd.functional.jacobian(model[k:], row[None])[0, :, 0] for row in h])
        torch.testing.assert_close(found[name], torch.einsum("nkd,nke->de", J, J) / 6)


def test_gradient_products_pass_a_layer_that_is_there_twice():
    torch.manual_seed(0)
    x, same, tanh = torch.randn(6, 5).double(), nn.Linear(5, 5).double(), nn.Tanh()
    twice = nn.Sequential(same, tanh, same, tanh, nn.Linear(5, 3).double())
    found, expected = (co.gradient_products(model, x) for model in (twice, copy.deepcopy(twice[:2]) + twice[2:]))
    for name in ("0.weight", "2.weight", "4.weight"): torch.testing.assert_close(found[name], expected[name])


def test_frozen_matrices_are_left_out_and_nested_layers_are_refused():
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3).requires_grad_(False))
    assert list(co.feature_equation(model, F.cross_entropy(model(x), y), 0.1)) == ["0.weight"]
    nested = nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), nn.Linear(7, 3))
    with pytest.raises(ValueError, match="0.0"): co.gradient_products(nested, x)


# --- grokking


def test_flatness_is_the_trace_of_the_hessian():
    g = torch.Generator().manual_seed(0)
    H, W, b = (torch.randn(*s, generator=g).double() for s in ((15, 3), (4, 3), (4,)))
    y = torch.arange(15) % 4
    hessian = torch.autograd.functional.hessian(lambda w: F.cross_entropy(H @ w.view(4, 3).T + b, y), W.flatten())
    torch.testing.assert_close(gk.relative_flatness(H, W, b), W.square().sum() * hessian.trace())


def test_the_table_of_addition_is_whole():
    (x, y), (x_test, y_test) = gk.modular_addition(7, 0.4, seed=1)
    assert len(x) == 20 and len({*map(tuple, x.tolist()), *map(tuple, x_test.tolist())}) == 49
    assert (y == (x[:, 0] + x[:, 1]) % 7).all() and (y_test == x_test.sum(1) % 7).all()


def test_pushing_and_holding_change_the_loss_by_nc1():
    plain, pushed, held = (gk.ModularAddition(modulus=5, share=0.8, push=p, hold=h, cap=0.5)
                           for p, h in ((0, 0), (1, 0), (0, 1)))
    torch.manual_seed(0)
    model, (x, y) = plain.network(), plain.tensors(None)["train"]
    losses = [r.loss(model, x, y).item() for r in (plain, pushed, held)]
    nc1 = nc1_trace(ClassStatistics.from_features(model[:-1](x), y, num_classes=5))
    assert losses[1] - losses[0] == pytest.approx(nc1, rel=1e-4)
    assert losses[0] - losses[2] == pytest.approx(min(nc1, 0.5), rel=1e-4)


def test_first_reached_is_the_first_step_or_nothing():
    import pandas as pd

    table = pd.DataFrame({0: [0.2, 0.6, 0.4], 1: [0.1, 0.1, 0.2]}, index=[0, 1, 4])
    np.testing.assert_array_equal(gk.first_reached(table, 0.5, steps=10), [10, np.nan])
