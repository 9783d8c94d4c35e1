"""What class statistics and the measures cost: seconds, extra memory, and the ratios that matter.

    python benchmarks/statistics.py            both sizes, a few minutes on two cores
    python benchmarks/statistics.py --scale 0.1   a tenth of the samples

Everything compared is run in turn, round after round in one process, so that a busy machine slows all of it alike; the
median of the rounds is printed, of the seconds by the clock and of those spent computing, which other programs disturb
less (they count each thread). OMP_NUM_THREADS sets the number of threads. Memory is the high-water mark of resident
memory in a process of its own (Linux only).

"every measure" is `measure_features`, from features in memory to all numbers, NC4 included; "of a stream" is what
`measure_collapse` adds to statistics that were read on the way ("stream full"), NC4 not included.

Compared with
  bare         X^T X over the same float32 batches, and nothing else: what a full covariance cannot do without
  two-pass     the plain way, as accumulator libraries go: a pass for the means, a pass for the covariance, one-hot
               products for class sums, D x D pseudo-inverses, tiled differences for CDNV, |x|^2 + |m|^2 - 2 x m for the
               nearest centre; in float32, and in float64, which is what it takes to be as accurate as ours
"""

# ruff: noqa: E402
import sys

if __name__ == "__main__": sys.path.pop(0)  # this folder, or `import statistics` anywhere below would find this file

import argparse
import ctypes
import gc
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from nc_nbdev.geometry.measures import measure_collapse, measure_features
from nc_nbdev.geometry.statistics import ClassStatistics

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


def one_hot(c, K, dtype): return (c[None] == torch.arange(K)[:, None]).to(dtype)  # (K, B)


def two_pass(H, y, W, b, dtype):
    "The plain way, every measure, all of it in one dtype."
    K, D, N = len(W), H.shape[1], len(H)
    W, b, n, sums = W.to(dtype), b.to(dtype), torch.zeros(K, dtype=dtype), torch.zeros(K, D, dtype=dtype)
    for h, c in batches(H, y):
        hot = one_hot(c, K, dtype); n += hot.sum(1); sums += hot @ h.to(dtype)
    mu = sums / n[:, None]; mu_G = mu.mean(0); M = mu - mu_G
    Sigma_W, v, disagree, right = torch.zeros(D, D, dtype=dtype), torch.zeros(K, dtype=dtype), 0, 0
    for h, c in batches(H, y):
        h = h.to(dtype); d = h - mu[c]; hot = one_hot(c, K, dtype)
        Sigma_W += (d / n[c, None]).T @ d / K; v += hot @ d.square().sum(1)
        near = (h.square().sum(1, keepdim=True) + mu.square().sum(1) - 2 * h @ mu.T).argmin(1)
        disagree += ((h @ W.T + b).argmax(1) != near).sum().item(); right += (near == c).sum().item()
    Sigma_B, v = M.T @ M / K, v / n
    # Rank-aware cut-offs, or float32 would invert rounding errors. Without them the time is the same.
    cut = 1e-5 if dtype == torch.float32 else 1e-12
    values = {"nc1_trace": Sigma_W.trace() / Sigma_B.trace(),
              "nc1_pinv": (Sigma_W @ torch.linalg.pinv(Sigma_B, rtol=cut)).trace() / K,
              "vci": 1 - (torch.linalg.pinv(Sigma_W + Sigma_B, rtol=cut) @ Sigma_B).trace() / min(K - 1, D),
              "cdnv": two_pass_cdnv(mu, v), "nc4_disagreement": disagree / N, "ncc_accuracy": right / N}
    return {k: float(x) for k, x in (values | two_pass_geometry(M, mu_G, W, b)).items()}


def two_pass_cdnv(mu, v, tile=32):
    "Differences of all pairs of means, tile by tile."
    total, K = 0.0, len(mu)
    for i in range(0, K, tile):
        for j in range(0, K, tile):
            d2 = (mu[i : i + tile, None] - mu[None, j : j + tile]).square().sum(-1)
            ratio = (v[i : i + tile, None] + v[None, j : j + tile]) / (2 * d2)
            if i == j: ratio.fill_diagonal_(0)
            total += ratio.sum().item()
    return total / (K * (K - 1))


def two_pass_geometry(M, mu_G, W, b):
    "NC2 and NC3."
    K = len(M)
    etf = (torch.eye(K, dtype=M.dtype) - 1 / K) / (K - 1) ** 0.5
    unit = M / M.norm(dim=1, keepdim=True)
    cos = (unit @ unit.T)[~torch.eye(K, dtype=torch.bool)]
    gram, cross, norms = M @ M.T, W @ M.T, M.norm(dim=1)
    return {"nc2_norms": norms.std(correction=0) / norms.mean(), "nc2_angles": cos.std(correction=0),
            "nc2_max_angle": (cos + 1 / (K - 1)).abs().mean(), "nc2_etf": (gram / gram.norm() - etf).norm(),
            "nc3_duality": (W / W.norm() - M / M.norm()).norm(), "nc3_etf": (cross / cross.norm() - etf).norm(),
            "nc3_cosine": torch.cosine_similarity(W, M).mean(), "nc3_bias": (W @ mu_G + b).norm()}


def seconds(jobs, rounds):
    "Median seconds of each job, by the clock and computing, and its last result; the jobs take turns."
    times, results = {name: [] for name in jobs}, {}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter(), time.process_time()
            results[name] = job()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.median(t, 0) for name, t in times.items()}, results


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
            "two-pass f64": lambda H, y: two_pass(H, y, W, b, torch.float64)}
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
    "Extra bytes of a job, in a process of its own."
    command = [sys.executable, __file__, "--memory", what, "--size", size, "--scale", str(scale)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def line(name, value, note=""): print(f"  {name:34s} {value:>12s}   {note}", flush=True)


def ratio(name, over, under, bar):
    met = "met" if over[0] <= bar * under[0] else "MISSED"
    line(name, f"{over[0] / under[0]:.2f}", f"computing {over[1] / under[1]:.2f}; bar {bar:.2f}: {met}")


def run(size, scale, rounds):
    "One table."
    N, D, K = SIZES[size]; N = int(N * scale)
    print(f"\nN = {N:,}, D = {D}, K = {K}, float32 features, batches of {BATCH}, "
          f"{torch.get_num_threads()} threads, median of {rounds}")
    H, y, W, b = make_data(N, D, K)
    streamed = ClassStatistics(K, D, within="full", class_counts=y.bincount())
    for h, c in batches(H, y): streamed.update(h, c)
    time_of, result = seconds({
        "bare": lambda: bare(H, y), "stream full": lambda: stream(H, y, K, "full"),
        "stream trace": lambda: stream(H, y, K, "trace"), "every measure": lambda: ours(H, y, W, b),
        "of a stream": lambda: measures_of(streamed, W, b),
        "two-pass f32": lambda: two_pass(H, y, W, b, torch.float32),
        "two-pass f64": lambda: two_pass(H, y, W, b, torch.float64)}, rounds)
    for name, (clock, computing) in time_of.items(): line(name, f"{clock:.3f} s", f"computing {computing:.3f} s")
    ratio("stream full / bare", time_of["stream full"], time_of["bare"], 1.5)
    bar = {"small": 1 / 4, "large": 1 / 5}[size]
    for what in "every measure", "of a stream":
        for dtype in "f32", "f64": ratio(f"{what} / two-pass {dtype}", time_of[what], time_of[f"two-pass {dtype}"], bar)
    for dtype in "f32", "f64":
        worst = max((abs(result["every measure"][k] - v) / max(abs(v), 1e-12), k)
                    for k, v in result[f"two-pass {dtype}"].items() if k != "nc3_bias")
        line(f"largest difference, two-pass {dtype}", f"{worst[0]:.1e}", f"relative, {worst[1]}")
    allowed = 8 * (2 * D * D + 6 * K * D) + 4 * BATCH * D
    for what in "bare", "stream trace", "stream full", "every measure", "two-pass f64":
        used = memory(size, scale, what)
        if used < 0: line(f"extra memory, {what}", "unknown"); continue
        met = "met" if used <= allowed else "MISSED"
        note = f"allowed {allowed / 2**20:.1f} MiB (2 D^2 + 6 K D doubles and one batch): {met}"
        line(f"extra memory, {what}", f"{used / 2**20:.1f} MiB", note if what == "stream full" else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, help="one size only")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples")
    parser.add_argument("--rounds", type=int, default=None, help="default: 5 for the small size, 3 for the large")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        N, D, K = SIZES[args.size]
        measure_memory(int(N * args.scale), D, K, args.memory)
        return
    for size in [args.size] if args.size else SIZES:
        run(size, args.scale, args.rounds or {"small": 5, "large": 3}[size])


if __name__ == "__main__": main()
