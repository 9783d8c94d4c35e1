"""What measuring costs: every measure of every layer of both splits, over the bare forward passes of the same network.

    python benchmarks/measuring.py            minutes on one core
    python benchmarks/measuring.py --scale 0.1   a tenth of the images

The two take turns in one process, and ratios are of the least seconds of each. The last line is the share of training
time that `CollapseRecorder` takes on a log grid, of a training of the digits net without it.
"""

import argparse
import time

import torch

from nc_nbdev.lab.recorder import CollapseRecorder
from nc_nbdev.lab.report import measure
from nc_nbdev.vision.data import ImageData
from nc_nbdev.vision.loaders import loaders
from nc_nbdev.vision.models import build_model
from nc_nbdev.vision.recipes import ImageRecipe
from nc_nbdev.vision.training import train

NETS = {"resnet18, 32 pixels": ("resnet18", 3, 32, 1.05), "small_resnet, 32 pixels": ("small_resnet", 3, 32, 1.10),
        "small_resnet, digits": ("small_resnet", 1, 8, 1.80)}


def images(channels, size, count):
    "A data set of noise: ten classes, a fourth of the images for testing."
    torch.manual_seed(0)
    parts = [(torch.randint(256, (n, channels, size, size), dtype=torch.uint8), torch.arange(n) % 10)
             for n in (count, count // 4)]
    return ImageData("noise", *parts[0], *parts[1], tuple("0123456789"))


def forward(model, *splits):
    "The passes alone."
    with torch.no_grad():
        for dl in splits:
            for x, _ in dl: model(x)


def least(jobs, rounds):
    "Least seconds of each job; they take turns."
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter(); job(); times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def line(name, value, bar):
    print(f"{name:44s} {value:6.2f}   bar {bar:.2f}: {'met' if value <= bar else 'MISSED'}", flush=True)


def train_digits(epochs, *cbs):
    recipe = ImageRecipe(epochs=epochs)
    learn = recipe.learner()
    with learn.no_bar(), learn.no_logging(): train(learn, recipe, cbs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images and epochs")
    parser.add_argument("--rounds", type=int, default=5, help="of which the least seconds count")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads")
    for name, (kind, channels, size, bar) in NETS.items():
        count = max(40, int(args.scale * {"resnet18": 500, "small_resnet": 1438 if size == 8 else 4000}[kind]))
        data = images(channels, size, count)
        model = build_model(kind, 10, channels, None, size).eval()
        _, train_dl, test_dl = loaders(data)
        found = least({"bare": lambda m=model, a=train_dl, b=test_dl: forward(m, a, b),
                       "measure": lambda m=model, a=train_dl, b=test_dl: measure(m, a, b)}, args.rounds)
        line(f"measure / forward, {name}", found["measure"] / found["bare"], bar)
    epochs = max(2, int(args.scale * 100))
    found = least({"plain": lambda: train_digits(epochs),
                   "recorded": lambda: train_digits(epochs, CollapseRecorder(every="log"))}, max(1, args.rounds // 2))
    line("training with / without recorder, digits", found["recorded"] / found["plain"], 1.10)


if __name__ == "__main__": main()
