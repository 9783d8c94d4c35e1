"""Images a second of training: ours, the best loop written by hand, and fastai as it comes, over image files.

    python benchmarks/training.py             minutes on one core
    python benchmarks/training.py --scale 0.2    a fifth of the images

All train the same network from the same start with the same optimiser, and take turns in one process. The least seconds
of each count. The hand-written loop has its images in memory as normalised float32, in the memory format that we use.
It is compared in float32. fastai, with its loaders and defaults, is compared with our training in the precision of the
presets of that size, "auto" from 28 pixels on: bfloat16 where it is fast. The last line says what bf16 gains.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.vision.all import ImageDataLoaders, Learner, OptimWrapper
from measuring import images, least
from PIL import Image

from nc_nbdev.vision.models import build_model
from nc_nbdev.vision.recipes import ImageRecipe, fast_precision
from nc_nbdev.vision.training import make_learner

CASES = {"digits": ("small_resnet", 1, 8, 1438), "28 pixels": ("small_resnet", 1, 28, 1000),
         "resnet18": ("resnet18", 3, 32, 256)}


def by_hand(data, recipe):
    "One epoch, nothing but PyTorch."
    torch.manual_seed(0)
    channels, size, _ = data.image_shape
    model = build_model(recipe.model, 10, channels, None, size).to(memory_format=torch.channels_last).train()
    x = data.train_images.float().div_(255).sub_(0.5).div_(0.29)
    opt = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    def epoch():
        for index in torch.randperm(len(x)).split(recipe.batch_size):
            opt.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[index]), data.train_labels[index]).backward()
            opt.step()
    return epoch


def ours(data, recipe):
    "One epoch of our learner, which does not validate."
    torch.manual_seed(0)
    return fitting(make_learner(recipe, data))


def plain_fastai(data, recipe, dls):
    "One epoch of a `Learner` as fastai makes it, with the same optimiser, which does not validate either."
    torch.manual_seed(0)
    channels, size, _ = data.image_shape
    model = build_model(recipe.model, 10, channels, None, size)
    sgd = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=recipe.momentum))
    return fitting(Learner(dls, model, F.cross_entropy, opt_func=sgd, lr=recipe.lr, wd=recipe.weight_decay))


def fitting(learn):
    learn.dls.valid = []
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return epoch


def files(data, folder, batch_size):
    "fastai's loaders over the images as files, without worker processes."
    for i, (image, y) in enumerate(zip(data.train_images, data.train_labels.tolist(), strict=True)):
        path = folder / str(y) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return ImageDataLoaders.from_folder(folder, valid_pct=0.01, bs=batch_size, num_workers=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images")
    parser.add_argument("--rounds", type=int, default=5, help="epochs, of which the least seconds count")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads")
    for name, (kind, channels, size, count) in CASES.items():
        count, recipe = max(80, int(args.scale * count)), ImageRecipe(model=kind, epochs=1, batch_size=64)
        data = images(channels, size, count)
        with tempfile.TemporaryDirectory() as folder:
            colour = replace(data, train_images=data.train_images.expand(-1, 3, -1, -1).contiguous(),
                             test_images=data.test_images.expand(-1, 3, -1, -1).contiguous())
            dls = files(colour, Path(folder), recipe.batch_size)
            jobs = {"by hand": by_hand(data, recipe), "ours": ours(data, recipe),
                    "fastai": plain_fastai(colour, recipe, dls),
                    "ours, bf16": ours(data, replace(recipe, precision="bf16"))}
            start = time.perf_counter()
            found = least(jobs, args.rounds)
        seen = dict.fromkeys(found, count) | {"fastai": len(dls.train) * recipe.batch_size}    # it drops the last batch
        rates = {job: seen[job] / clock for job, clock in found.items()}
        print(f"\n{name}: " + ", ".join(f"{job} {rate:.0f} images/s" for job, rate in rates.items()), flush=True)
        best = "ours" if name == "digits" or fast_precision() == "float32" else "ours, bf16"
        for mine, other, bar in (("ours", "by hand", 0.95), (best, "fastai", 1.3)):
            value, what = rates[mine] / rates[other], f"{mine} / {other}"
            print(f"  {what:20s} {value:6.2f}   bar {bar:.2f}: {'met' if value >= bar else 'MISSED'}")
        gain = rates["ours, bf16"] / rates["ours"]
        print(f"  {'bf16 / float32':20s} {gain:6.2f}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__": main()
