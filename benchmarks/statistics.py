"""What class statistics and the measures cost: seconds, extra memory, and the ratios that matter.

    python benchmarks/statistics.py               both sizes with one thread and with two, minutes
    python benchmarks/statistics.py --curves      also over N, D and K, into results/benchmarks/statistics.csv
    python benchmarks/statistics.py --extreme     only a vocabulary of 50,257 words: seconds and memory of one stream

Everything compared is run in turn, round after round in one process, so that a busy machine slows all of it alike. The
smallest of the rounds is printed, and ratios are of these. Memory is the high-water mark of resident memory in a
process of its own (Linux only).

"every measure" is `measure_features`, from features in memory to all numbers; "its measures" only those that the
library has; "of a stream" is what `measure_collapse` adds to statistics that were read on the way ("stream full").

Compared with
  bare     X^T X over the same float32 batches, and nothing else: what a full covariance cannot do without
  library  the formulas of github.com/rhubarbwu/neural-collapse in float32: a pass for the means, a pass for covariance,
           variances and decisions, one-hot products for sums, a pseudo-inverse, tiled differences for CDNV. Where the
           package `neural_collapse` is installed, it is run, too.
"""

# ruff: noqa: E402
import sys

if __name__ == "__main__": sys.path.pop(0)  # this folder, or `import statistics` anywhere below would find this file

import argparse
import csv
import ctypes
import gc
import json
import resource
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from nc_nbdev.geometry.duality import nc3_cosine, nc3_etf
from nc_nbdev.geometry.means import nc2_etf
from nc_nbdev.geometry.measures import measure_collapse, measure_features
from nc_nbdev.geometry.nearest_centre import nc4_disagreement, nearest_centre
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.geometry.variability import cdnv, nc1_pinv, nc1_trace

SIZES = {"small": (50_000, 512, 10), "large": (50_000, 2048, 1000)}
BATCH = 256


def make_data(N, D, K):
    "Features (N, D) float32 around K random means, labels, and a classifier."
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(K, D, generator=generator)
    y = torch.cat([torch.arange(K), torch.randint(K, (N - K,), generator=generator)])
    H = torch.empty(N, D).normal_(generator=generator)
    for h, c in zip(H.split(BATCH), y.split(BATCH), strict=True): h += mu[c]
    return H, y, mu.clone(), torch.zeros(K)


def batches(H, y): return zip(H.split(BATCH), y.split(BATCH), strict=True)


def bare(H, y):
    "The product alone."
    gram = torch.zeros(H.shape[1], H.shape[1])
    for h, _ in batches(H, y): gram += h.T @ h
    return gram


def stream(H, y, K, within):
    "One pass of ClassStatistics over the batches."
    stats = ClassStatistics(K, H.shape[1], within=within)
    for h, c in batches(H, y): stats.update(h, c)
    return stats


def ours(H, y, W, b): return measure_features(H, y, num_classes=len(W), head=(W, b)).to_dict()


def measures_of(stats, W, b): return measure_collapse(stats._copy(), (W, b)).to_dict()  # a copy remembers no results


def its_measures(H, y, W, b):
    "Ours, of what the library has."
    s = ClassStatistics.from_features(H, y, num_classes=len(W))
    return {"nc1_trace": nc1_trace(s, "sample"), "nc1_pinv": nc1_pinv(s, "sample"), "cdnv": cdnv(s),
            "nc2_etf": nc2_etf(s), "nc3_etf": nc3_etf(W, s), "nc3_cosine": nc3_cosine(W, s),
            "nc4_disagreement": nc4_disagreement(H, W, b, s.means)}


def library(H, y, W, b, dtype=torch.float32):
    "The library's formulas, written for this comparison."
    K, D, N = len(W), H.shape[1], len(H)
    W, b, n, sums = W.to(dtype), b.to(dtype), torch.zeros(K, dtype=dtype), torch.zeros(K, D, dtype=dtype)
    def hot(c): return (c[:, None] == torch.arange(K)).T.to(dtype)  # (K, B)
    for h, c in batches(H, y): part = hot(c); n += part.sum(1); sums += part @ h.to(dtype)
    mu = sums / n[:, None]; M = mu - mu.mean(0)
    total, v, same = torch.zeros(D, D, dtype=dtype), torch.zeros(K, dtype=dtype), 0
    for h, c in batches(H, y):
        h = h.to(dtype); d = h - mu[c]
        total += d.T @ d; v += (hot(c) @ d.square()).sum(1)
        near = (h.norm(dim=1)[:, None] ** 2 + mu.norm(dim=1) ** 2 - 2 * h @ mu.T).argmin(1)
        same += ((h @ W.T + b).argmax(1) == near).sum().item()
    Sigma_W, Sigma_B, v = total / N, M.T @ M / K, v / n
    pinv = torch.linalg.pinv(Sigma_B, rtol=1e-5 if dtype == torch.float32 else 1e-12)  # or it inverts rounding
    pairs = torch.zeros(K, K, dtype=dtype)
    for i in range(0, K, 64):
        for j in range(0, K, 64):
            d2 = (mu[i : i + 64, None] - mu[None, j : j + 64]).square().sum(-1)
            pairs[i : i + 64, j : j + 64] = (v[i : i + 64, None] + v[j : j + 64]) / (2 * d2)
    etf = (torch.eye(K, dtype=dtype) - 1 / K) / (K - 1) ** 0.5
    gram, cross = M @ M.T, W @ M.T
    values = {"nc1_trace": Sigma_W.trace() / Sigma_B.trace(), "nc1_pinv": (pinv @ Sigma_W).trace() / K,
              "cdnv": pairs.triu(1).sum() / (K * (K - 1) / 2), "nc2_etf": (gram / gram.norm() - etf).norm(),
              "nc3_etf": (cross / cross.norm() - etf).norm(),
              "nc3_cosine": torch.cosine_similarity(W, M).mean(), "nc4_disagreement": 1 - same / N}
    return {k: float(x) for k, x in values.items()}


def library_itself(H, y, W, b):
    "The package, where it is installed."
    from neural_collapse import accumulate as acc
    from neural_collapse import measure as nc
    K, D = W.shape
    means = acc.MeanAccumulator(K, D, "cpu")
    for h, c in batches(H, y): means.accumulate(h, c)
    M, m_G = means.compute()
    parts = [acc.CovarAccumulator(K, D, "cpu", M=M), acc.VarNormAccumulator(K, D, "cpu", M=M)]
    decisions = acc.DecAccumulator(K, D, "cpu", M=M, W=W)
    for h, c in batches(H, y):
        for part in parts: part.accumulate(h, c, M)
        decisions.accumulate(h, c, W, M)
    return {"nc1_pinv": nc.covariance_ratio(parts[0].compute(), M, m_G),
            "cdnv": nc.variability_cdnv(parts[1].compute()[0], M, tile_size=64),
            "nc2_etf": nc.simplex_etf_error(M, m_G), "nc3_etf": nc.self_duality_error(W, M, m_G),
            "nc4_disagreement": 1 - nc.clf_ncc_agreement(decisions)}


def seconds(jobs, rounds):
    "Least seconds of each job, and its last result; the jobs take turns."
    times, results = {name: [] for name in jobs}, {}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            results[name] = job()
            times[name].append(time.perf_counter() - start)
    return {name: min(t) for name, t in times.items()}, results


def high_water():
    "High-water mark of this process's resident memory in bytes, and a reset of it; None where there is no /proc."
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists(): return None
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    reset.write_text("5")
    return int(peak.split()[1]) * 1024


def measure_memory(N, D, K, what):
    "Print the extra bytes that one job needs beyond its input."
    H, y, W, b = make_data(N, D, K)
    jobs = {"bare": lambda H, y: bare(H, y), "stream trace": lambda H, y: stream(H, y, K, "trace"),
            "stream full": lambda H, y: stream(H, y, K, "full"), "every measure": lambda H, y: ours(H, y, W, b),
            "library": lambda H, y: library(H, y, W, b)}
    # threads, their buffers and the library's code, loaded when first used, are not counted
    if what == "every measure": measure_features(torch.randn(1000, 64), torch.arange(1000) % 4, num_classes=4)
    for dtype in torch.float32, torch.float64:
        x = torch.randn(600, 300).to(dtype)
        x.T @ x, torch.addmm(x[:300, 0], x[:300], x[:300].T)
    stream(H[: 4 * BATCH], y[: 4 * BATCH], K, "full")
    del x; gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"): libc.malloc_trim(0)  # or freed pages are used again, uncounted
    high_water()
    before = high_water()
    kept = jobs[what](H, y)
    print(-1 if before is None else high_water() - before)
    return kept


def memory(size, scale, what):
    "Extra bytes of a job, in a process of its own; of the small size, where an arena more or less counts, the median."
    command = [sys.executable, __file__, "--memory", what, "--size", size, "--scale", str(scale)]
    found = [int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
             for _ in range(3 if size == "small" else 1)]
    return sorted(found)[len(found) // 2]


def line(name, value, note=""): print(f"  {name:34s} {value:>12s}   {note}", flush=True)


def ratio(name, over, under, bar):
    line(name, f"{over / under:.2f}", f"bar {bar:.2f}: {'met' if over <= bar * under else 'MISSED'}")


def jobs_of(N, D, K):
    "What is timed, by name."
    H, y, W, b = make_data(N, D, K)
    streamed = ClassStatistics(K, D, within="full", class_counts=y.bincount())
    for h, c in batches(H, y): streamed.update(h, c)
    jobs = {"bare": lambda: bare(H, y), "stream full": lambda: stream(H, y, K, "full"),
            "trace": lambda: nc1_trace(ClassStatistics.from_features(H, y, K, within="trace")),
            "its measures": lambda: its_measures(H, y, W, b), "every measure": lambda: ours(H, y, W, b),
            "of a stream": lambda: measures_of(streamed, W, b), "library": lambda: library(H, y, W, b)}
    if find_spec("neural_collapse"): jobs["library itself"] = lambda: library_itself(H, y, W, b)
    return jobs, lambda: {"every measure": ours(H.double(), y, W, b), "its measures": its_measures(H.double(), y, W, b),
                          "library": library(H, y, W, b, torch.float64)}


def run(size, scale, rounds, threads):
    "One table for each number of threads."
    N, D, K = SIZES[size]; N = int(N * scale)
    jobs, exact = jobs_of(N, D, K)
    for count in threads:
        torch.set_num_threads(count)
        print(f"\nN = {N:,}, D = {D}, K = {K}, float32, batches of {BATCH}, {count} threads, least of {rounds}")
        time_of, result = seconds(jobs, rounds)
        for name, clock in time_of.items(): line(name, f"{clock:.3f} s")
        ratio("stream full / bare", time_of["stream full"], time_of["bare"], 1.5)
        for name in [name for name in time_of if name.startswith("library")]:
            ratio(f"every measure / {name}", time_of["every measure"], time_of[name], 0.8 if size == "small" else 0.25)
            ratio(f"its measures / {name}", time_of["its measures"], time_of[name], 0.4)
        if size == "small": ratio("trace, of 0.05 s", time_of["trace"], 0.05, 1.0)
    for name, expected in exact().items():
        worst = max((abs(result[name][k] - v) / max(abs(v), 1e-12), k) for k, v in expected.items() if v is not None)
        met = "" if name == "library" else f", bar 1e-5: {'met' if worst[0] <= 1e-5 else 'MISSED'}"
        line(f"largest difference, {name}", f"{worst[0]:.1e}", f"from float64, relative, {worst[1]}{met}")
    allowed = 8 * (2 * D * D + 6 * K * D) + 4 * BATCH * D
    for what in "bare", "stream trace", "stream full", "every measure", "library":
        used = memory(size, scale, what)
        if used < 0: line(f"extra memory, {what}", "unknown"); continue
        met = "met" if used <= allowed else "MISSED"
        note = f"allowed {allowed / 2**20:.1f} MiB (2 D^2 + 6 K D doubles and one batch): {met}"
        line(f"extra memory, {what}", f"{used / 2**20:.1f} MiB", note if what == "stream full" else "")


CURVES = {"N": [(n, 512, 10) for n in (2000, 10_000, 50_000)], "D": [(20_000, d, 10) for d in (64, 256, 1024)],
          "K": [(20_000, 512, k) for k in (10, 100, 400)]}


def curves(file, rounds=3):
    "Seconds over N, D and K, one thread, into a table."
    torch.set_num_threads(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("over", "N", "D", "K", "what", "seconds"))
        for over, sizes in CURVES.items():
            for N, D, K in sizes:
                for what, clock in seconds(jobs_of(N, D, K)[0], rounds)[0].items():
                    table.writerow((over, N, D, K, what, f"{clock:.5f}"))
    from nc_nbdev.reproduce import environment  # not before memory is measured
    file.with_suffix(".json").write_text(json.dumps(environment(), indent=1) + "\n")


def extreme(N, D=768, K=50_257, batch=4096):
    "One stream of features that never are in memory together, then every measure of its statistics."
    generator = torch.Generator().manual_seed(0)
    mu, y = torch.randn(K, D, generator=generator), torch.cat([torch.arange(K), torch.randint(K, (N - K,))])
    print(f"\nN = {N:,}, D = {D}, K = {K:,}, float32, batches of {batch}, {torch.get_num_threads()} threads",
          flush=True)
    start, stats = time.perf_counter(), ClassStatistics(K, D, "full", y.bincount())
    for c in y.split(batch): stats.update(torch.randn(len(c), D, generator=generator) + mu[c], c)
    line("stream full", f"{time.perf_counter() - start:.0f} s")
    found, start = measure_collapse(stats, (mu, None)), time.perf_counter() - start
    line("every measure of it", f"{start:.0f} s in all")
    start, c = time.perf_counter(), y[:batch]
    near = nearest_centre(torch.randn(len(c), D, generator=generator) + mu[c], stats.means)
    line(f"nearest centre of {batch} samples", f"{time.perf_counter() - start:.0f} s",
         f"accuracy {(near == c).double().mean():.3f}")
    print(found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line("memory of the process", f"{peak / 1e9:.2f} GB", f"bar 6 GB: {'met' if peak < 6e9 else 'MISSED'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, help="one size only")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples")
    parser.add_argument("--rounds", type=int, default=None, help="default: 5 for the small size, 3 for the large")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--curves", action="store_true", help="also over N, D and K")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--extreme", action="store_true", help="50,257 classes, and nothing else")
    args = parser.parse_args()
    if args.extreme: return extreme(max(60_000, int(200_000 * args.scale)))
    if args.memory:
        N, D, K = SIZES[args.size]
        measure_memory(int(N * args.scale), D, K, args.memory)
        return
    for size in [args.size] if args.size else SIZES:
        run(size, args.scale, args.rounds or {"small": 5, "large": 3}[size], args.threads)
    if args.curves: curves(Path(__file__).parents[1] / "results/benchmarks/statistics.csv")


if __name__ == "__main__": main()
