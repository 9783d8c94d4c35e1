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


@pytest.mark.parametrize("name", nc.__all__)
def test_public_names_resolve(name):
    assert callable(getattr(nc, name)) and getattr(nc, name).__doc__


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): nc.nothing  # noqa: B018
