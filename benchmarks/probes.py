"""What the solver behind the linear probe costs, against scikit-learn's: seconds of computing to the same accuracy.

    python benchmarks/probes.py           under a minute on one core
    python benchmarks/probes.py --full    also wide features, minutes

scikit-learn's solvers get the loosest tolerance at which the objective, mean cross-entropy + penalty, is within 1e-7 of
its minimum; ours stops at 1e-8 as it always does. A solver that needs more than the seconds allowed is cut off ("> 5").
Features: standardised and whitened ones of a network trained on pairs of digits, and, with --full, made ones.
"""

import argparse
import os

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

import signal  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from nc_nbdev.lab.probes import fit_logistic, fit_transform  # noqa: E402

GAP = 1e-7
TOLERANCES = {"newton-cg": (1e-4, 1e-5, 1e-6, 1e-7, 1e-8), "newton-cholesky": (1e-4, 1e-6, 1e-8)}


def digits(epochs):
    "Features (1438, 64) of digits, fine and coarse labels, from a network trained on pairs."
    from nc_nbdev.lab.runs import get_run
    from nc_nbdev.lab.settings import Settings
    from nc_nbdev.vision.recipes import ImageRecipe
    from nc_nbdev.vision.transfer import feature_tasks
    with tempfile.TemporaryDirectory() as folder:
        recipe = ImageRecipe(coarse="pairs", epochs=epochs, measure_points=2)
        run = get_run(recipe, Settings(device="cpu", runs_dir=folder), progress=False)
        task = feature_tasks(run, epochs, ("pool",))["pool"]
    return task.train, task.fine, task.coarse


def made(N, D=512, K=10, epsilon=0.01):
    "Features (N, D) with classes in pairs: pairs one apart, classes epsilon apart, noise of decaying scale."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % K
    H = torch.randn(K // 2, D, generator=g)[y // 2] + epsilon * torch.randn(K, D, generator=g)[y]
    H += 3 * epsilon * torch.logspace(0, -2, D) * torch.randn(N, D, generator=g)
    return H @ torch.linalg.qr(torch.randn(D, D, generator=g))[0], y, y // 2


def objective(A, X, y, C):
    return (F.cross_entropy(X @ A[:, :-1].T + A[:, -1], y) + A[:, :-1].square().sum() / (2 * C * len(y))).item()


def theirs(solver, tol, X, y, C):
    "Weights (K, D + 1) by scikit-learn."
    fit = LogisticRegression(C=C, solver=solver, tol=tol, max_iter=100_000).fit(X.numpy(), y.numpy())
    return torch.cat([torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)[:, None]], 1)


class TooLong(Exception): pass


def timed(fit, limit):
    "Result and seconds of computing; None where `limit` seconds were not enough."
    def stop(*_): raise TooLong
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    start = time.process_time()
    try: return fit(), time.process_time() - start
    except TooLong: return None, limit
    finally: signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def row(X, y, C, limit, skip=()):
    "Seconds to the gap, by solver."
    best = objective(fit_logistic(X, y, C, tol=1e-12, max_steps=200).weights, X, y, C)
    fit, seconds = timed(lambda: fit_logistic(X, y, C), limit)
    found = {"ours": f"{seconds:.2f}" if fit and objective(fit.weights, X, y, C) < best + GAP else f"> {limit}"}
    for solver, tolerances in TOLERANCES.items():
        found[solver] = "-" if solver in skip else f"> {limit}"
        for tol in () if solver in skip else tolerances:
            A, seconds = timed(lambda: theirs(solver, tol, X, y, C), limit)    # noqa: B023
            if A is None: break
            if objective(A, X, y, C) < best + GAP: found[solver] = f"{seconds:.2f}"; break
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="also wide features, and more time for each solver")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    H, y, coarse = digits(80)
    problems = {f"digits, {kind}": (fit_transform(H, kind, coarse)(H), y) for kind in ("standardised", "whitened")}
    for N in (1438, 5000) if full else ():
        H, y, coarse = made(N)
        problems[f"made, N = {N}, D = 512"] = (fit_transform(H, "standardised")(H), y)
    heads = "".join(f"{s:>17s}" for s in ("ours", *TOLERANCES))
    print(f"{'seconds to a gap of ' + format(GAP, 'g'):26s} {'C':>8s}{heads}")
    for name, (X, y) in problems.items():
        for C in (1, 100, 1e4):
            wide = X.shape[1] > 100                       # a Hessian of all classes, 5130 x 5130, is out of reach
            found = row(X, y, C, 60 if full else 5, ("newton-cholesky",) if wide else ())
            print(f"{name:26s} {C:8g}" + "".join(f"{s:>17s}" for s in found.values()), flush=True)


if __name__ == "__main__": main()
