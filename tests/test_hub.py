"""Pushing to the Hugging Face Hub: the real client over loopback, against a small server of our own (hub_server.py)."""

import hub_server
import pytest
from test_storage import AtMegabyte, on_disk, put
from training import exit_code_of

from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.storage import sync

FILES = {"README.md": b"---\ntags: [x]\n---\n", "a.bin": b"a" * 2_000_000, "deep/b.bin": b"b" * 3_000_000}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with hub_server.serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # loopback is no network
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # our server does not speak Xet
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield served


def test_a_repository_is_made_private_and_filled_by_one_commit_and_not_again(hub, tmp_path):
    put(FILES, "hf://me/model")
    assert hub.repositories == {"models/me/model": FILES}
    assert hub.private == {"models/me/model": True}
    assert put(FILES, "hf://me/model").sent == {}
    assert put(FILES | {"c.json": b"{}"}, "hf://me/model").sent == {"c.json": 2}
    assert hub.commits == [sorted(FILES), ["c.json"]]
    assert sync.get("hf://me/model", tmp_path / "back", Silent()).bytes == 5_000_020
    assert on_disk(tmp_path / "back") == FILES | {"c.json": b"{}"}


def test_a_dataset_and_a_path_in_a_repository(hub):
    put(FILES, "hf://datasets/me/pairs/v1")
    assert set(hub.repositories["datasets/me/pairs"]) == {f"v1/{name}" for name in FILES}
    assert put(FILES, "hf://datasets/me/pairs/v1").sent == {}


def test_after_a_kill_nothing_is_half_there_and_only_the_rest_is_uploaded(hub):
    assert exit_code_of(lambda: put(FILES, "hf://me/model", AtMegabyte(2000))) == -9  # kilobytes
    assert (hub.uploaded, hub.repositories) == ([2_000_000], {"models/me/model": {}})
    put(FILES, "hf://me/model")
    assert hub.uploaded == [2_000_000, 3_000_000]
    assert hub.repositories == {"models/me/model": FILES}


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_without_a_token_the_login_command_is_named(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="not logged in to the Hub") as caught:
        put(FILES, "hf://me/model")
    assert caught.value.hint.startswith("hf auth login")
    assert hub.repositories == {}


def test_a_repository_that_is_not_there_has_nothing_to_fetch(hub, tmp_path):
    with pytest.raises(UserError, match="nothing is there"):
        sync.get("hf://me/none", tmp_path / "back", Silent())
