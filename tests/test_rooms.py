"""No room uses a room of a higher floor, whether it imports it or names it in a string."""

import shutil
from pathlib import Path

import pytest

from nc_nbdev.rooms import ROOMS, package_imports, room_of, upward_arrows

PACKAGE = Path(__file__).resolve().parents[1] / "nc_nbdev"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "The arrows that one more line in a module adds, in a copy of the package that has a module `extra` in every room."
    copy = tmp_path_factory.mktemp("house") / "nc_nbdev"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("lab", "vision", "paper", "theory"):
        (copy / room).mkdir(exist_ok=True)
        (copy / room / "extra.py").write_text("x = 1\n", encoding="utf-8")
    (copy / "reproduce.py").touch()
    before = set(upward_arrows(package_imports(copy)))

    def arrows(line, module="lab/extra.py"):
        text = (copy / module).read_text(encoding="utf-8")
        (copy / module).write_text(f"{text}\n{line}\n", encoding="utf-8")
        after = upward_arrows(package_imports(copy))
        (copy / module).write_text(text, encoding="utf-8")
        return set(after) - before

    return arrows


def test_no_arrow_leads_up():
    assert upward_arrows() == []


def test_every_module_is_in_a_room():
    assert {m for m in package_imports() if not room_of(m)} == {"rooms"}
    assert list(ROOMS.values()) == sorted(ROOMS.values())


@pytest.mark.parametrize("line", [
    "import nc_nbdev.theory.extra",
    "from nc_nbdev.theory import extra",
    "from ..theory.extra import x",
    "def f():\n    from ..theory import extra",
    "import_module('nc_nbdev.theory.extra')",
    "importlib.import_module('..theory.extra', __package__)",
    "MODULES = {'extra': 'theory.extra'}",
    "code = 'from nc_nbdev.theory.extra import x'",
])
def test_an_upward_arrow_is_found(house, line):
    assert house(line) == {("lab.extra", "theory.extra")}


@pytest.mark.parametrize("line", ["import_module(f'nc_nbdev.theory.{name}')", "from .. import theory",
                                  "import_module('theory')", "name = 'nc_nbdev.theory'"])
def test_a_room_is_found(house, line):
    assert house(line) == {("lab.extra", "theory")}


@pytest.mark.parametrize("line", ["module = f'nc_nbdev.{name}'", "import_module(f'{package}.{name}')",
                                  "import_module(name=name)", "from .. import measure"])
def test_what_may_be_any_module_is_found(house, line):
    assert house(line) == {("lab.extra", "*")}


def test_rooms_of_one_floor_do_not_use_one_another(house):
    assert house("from ..theory import extra", "paper/extra.py") == {("paper.extra", "theory.extra")}
    assert house("from ..paper import extra", "theory/extra.py") == {("theory.extra", "paper.extra")}


def test_an_init_file_may_not_look_up_either(house):
    assert house("from ..paper import extra", "lab/__init__.py") == {("lab", "paper.extra")}


def test_nobody_imports_reproduce_nor_the_map(house):
    assert house("from .. import reproduce", "paper/extra.py") == {("paper.extra", "reproduce")}
    assert house("from ..rooms import ROOMS", "vision/extra.py") == {("vision.extra", "rooms")}


@pytest.mark.parametrize("line, module", [
    ("from ..lab import extra", "vision/extra.py"),
    ("from ..vision import extra", "theory/extra.py"),
    ("STUDIES = {'extra': 'theory.extra'}; import_module(f'nc_nbdev.{name}')", "reproduce.py"),
    ("preset, split = 'paper', 'theory'", "lab/extra.py"),
    ("def f():\n    'As nc_nbdev.theory.extra says.'", "lab/extra.py"),
    ("style = 'nc_nbdev.house'", "lab/extra.py"),
])
def test_what_is_allowed(house, line, module):
    assert house(line, module) == set()
