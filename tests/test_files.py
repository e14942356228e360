"""Folders that are replaced as a whole. Kills between the writes of files: `test_crashes.py`."""

import errno

import pytest

from dpo_cli.data import files
from dpo_cli.errors import UserError


def test_a_folder_is_replaced_as_a_whole_and_all_can_read_it(tmp_path):
    """safetensors makes its files for their owner alone; vLLM in a container is another user."""
    from safetensors.numpy import save_file

    folder = tmp_path / "adapter"
    for text in ("first", "second"):
        with files.replacing_folder(folder) as staged:
            save_file({}, staged / "model.safetensors")
            (staged / text).write_text(text)
    assert sorted(file.name for file in folder.iterdir()) == ["model.safetensors", "second"]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_stays_as_it_is_where_the_new_one_fails(tmp_path):
    folder = tmp_path / "adapter"
    with files.replacing_folder(folder) as staged:
        (staged / "kept").touch()
    with pytest.raises(UserError, match="full"), files.replacing_folder(folder) as staged:
        (staged / "half").touch()
        raise OSError(errno.ENOSPC, "no space left")
    assert [file.name for file in folder.iterdir()] == ["kept"]
    with files.replacing_folder(folder) as staged:
        (staged / "new").touch()
    assert [file.name for file in folder.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [folder]
