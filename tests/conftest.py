"""What every test needs: that Ctrl-C is heard; and what training's tests start from."""

import os
import signal
import tempfile

import pytest

# A process a core; and torch's pool of several threads is broken in a process that was forked. Read as torch loads.
os.environ["OMP_NUM_THREADS"] = "1"

from adapters import base_model, save_adapter
from training import write_data

# What is remembered of model files goes to a folder of the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="nothing-dpo-tests-")

# A shell that starts pytest in the background has it, and all that it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="every architecture and kind of adapter")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--matrix"):
        for item in items:
            if item.get_closest_marker("matrix"):
                item.add_marker(pytest.mark.skip(reason="--matrix runs it"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny base, an SFT adapter on it, and pairs."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    save_adapter(folder / "sft", base_model(folder / "base"))
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def unknown_endpoints():
    """What an endpoint takes is remembered by its URL, and two tests' servers may have the same port."""
    from dpo_cli.endpoint import dialect

    dialect.forget()
