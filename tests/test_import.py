"""The package is light to import, and works offline."""

import subprocess
import sys

import pytest

import nc_nbdev as nc


def fresh(code):
    "Run code in a new interpreter with the network cut; its output."
    guard = "import socket; socket.socket.connect = lambda *a: (_ for _ in ()).throw(OSError('network used'))\n"
    return subprocess.run([sys.executable, "-c", guard + code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    loaded = fresh("import sys, nc_nbdev\n"
                   "print(*[m for m in ('torch', 'torchvision', 'fastai', 'sklearn', 'pandas') if m in sys.modules])")
    assert loaded.split() == []


def test_geometry_loads_neither_fastai_nor_torchvision():
    loaded = fresh("import sys, nc_nbdev as nc; nc.measure_features; nc.ClassStatistics; nc.test_collapse\n"
                   "print(*[m for m in ('torchvision', 'fastai', 'matplotlib') if m in sys.modules])")
    assert loaded.split() == []


def test_measuring_a_plain_network_loads_no_fastai():
    loaded = fresh("""
import sys, torch, nc_nbdev as nc
y = torch.arange(40) % 4
model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
nc.measure(model, [(torch.randn(40, 5), y)], [(torch.randn(40, 5), y)])
print(*[m for m in ('torchvision', 'fastai', 'plotly', 'IPython') if m in sys.modules])""")
    assert loaded.split() == []


@pytest.mark.parametrize("name", nc.__all__)
def test_public_names_resolve(name):
    assert callable(getattr(nc, name)) and getattr(nc, name).__doc__


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): nc.nothing  # noqa: B018
