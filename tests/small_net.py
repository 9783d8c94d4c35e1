"A small residual network, few digits and a loader that knows its labels: what the tests of taps and reports measure."
import copy
from collections import OrderedDict
from types import SimpleNamespace

import torch
from sklearn.datasets import load_digits
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x): return torch.relu(self.bn1(self.conv1(x)) + self.shortcut(x))


class Net(nn.Module):
    tap_names = ("stem", "stage1", "stage2", "pool")

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1, self.stage2, self.stage3 = (nn.Sequential(Block(*s)) for s in ((8, 8, 1), (8, 16, 2), (16, 32, 2)))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(32, 10)

    def forward(self, x): return self.head(self.pool(self.stage3(self.stage2(self.stage1(self.stem(x))))))


class Batches:
    "Batches in order; counts its epochs, knows its labels."
    def __init__(self, x, y, batch_size=512, augment=None, drop_last=False):
        self.x, self.y, self.batch_size = x, y, batch_size
        self.augment, self.drop_last, self.epoch = augment, drop_last, 0

    def set_epoch(self, epoch): self.epoch = epoch; return self

    @property
    def class_counts(self): return self.y.bincount(minlength=10)

    def clean(self): return Batches(self.x, self.y, self.batch_size)

    def __len__(self): return -(-len(self.y) // self.batch_size)

    def __iter__(self):
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            if len(x) == self.batch_size or not self.drop_last: yield x, y
        self.epoch += 1


class Output(OrderedDict):
    "A mapping that can also be asked by attribute and by place, as the outputs of many models are."
    def __getattr__(self, name):
        if name in self: return self[name]
        raise AttributeError(name)

    def __getitem__(self, key): return super().__getitem__(key) if isinstance(key, str) else list(self.values())[key]


class Words(nn.Module):
    "Whole numbers through two blocks of attention to what came before, with a mask; a classifier for every token."
    def __init__(self, vocabulary=7, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, 0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids, attention_mask=None, past=None):
        later = torch.ones(input_ids.shape[1], input_ids.shape[1]).triu(1).bool()
        hidden = (None if attention_mask is None else attention_mask == 0)
        x = self.embed(input_ids)
        for block in self.blocks: x = block(x, src_mask=later, src_key_padding_mask=hidden)
        return Output(logits=self.head(x), hidden=x)


def few_digits():
    "30 train and 12 test images of each digit."
    x, y = (torch.as_tensor(part) for part in (load_digits().images[:, None] / 16, load_digits().target))
    rank = (y[:, None] == y).tril(-1).sum(1)                      # how many of the same digit came before
    train, test = rank < 30, (rank >= 30) & (rank < 42)
    return SimpleNamespace(x=x[train].float(), y=y[train], test_x=x[test].float(), test_y=y[test])


def loaders(data, batch_size=512):
    "The train and the test set."
    return Batches(data.x, data.y, batch_size), Batches(data.test_x, data.test_y, batch_size)


def trained_net(data):
    "Trained for a few steps, so that its batch statistics are not the initial ones."
    torch.manual_seed(0)
    model = Net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        for x, y in loaders(data, 100)[0]:
            nn.functional.cross_entropy(model(x), y).backward(); optimiser.step(); optimiser.zero_grad()
    return model


def by_hand(model, x):
    "The layers of a `Net`, one after another."
    found = {"stem": model.stem(x)}
    found["stage1"] = model.stage1(found["stem"])
    found["stage2"] = model.stage2(found["stage1"])
    found["pool"] = model.pool(model.stage3(found["stage2"]))
    return found


def all_by_hand(model, dl):
    "{layer: (N, D)} of a loader, in evaluation mode."
    model = copy.deepcopy(model).eval()
    with torch.no_grad(): batches = [by_hand(model, x) for x, _ in dl]
    pooled = lambda t: t.mean((2, 3)) if t.ndim == 4 else t
    return {layer: torch.cat([pooled(b[layer]) for b in batches]) for layer in batches[0]}


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
