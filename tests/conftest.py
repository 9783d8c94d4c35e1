import os
import socket
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("long", max_examples=1000, deadline=None)   # for pytest --hypothesis-profile=long
os.environ.setdefault("MPLBACKEND", "Agg")


HERE = (None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname())


def _offline(event, args):
    "No test reaches another machine."
    if event not in ("socket.connect", "socket.getaddrinfo"): return
    host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else None
    if host not in HERE and not str(host).startswith("127."): raise OSError(f"tests are offline: {host}")


sys.addaudithook(_offline)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "In continuous integration only tests that need a GPU may be skipped."
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and os.environ.get("CI") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped in continuous integration: {report.longrepr}"
    return report
