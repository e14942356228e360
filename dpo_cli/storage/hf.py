"""`hf://owner/name`, `hf://datasets/owner/name`: a repository on the Hugging Face Hub, made private if there is none.

All files appear in one commit. Large ones are uploaded before it, one after the other; what the Hub has of them by then
it does not take again.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dpo_cli.errors import Exit, UserError
from dpo_cli.storage import Done, Source, Stored
from dpo_cli.storage.sync import size_of

LOGIN = "hf auth login, or HF_TOKEN=…"


class Repository:
    """The files under a path of a repository."""

    atomic = True

    def __init__(self, kind: str, name: str, path: str) -> None:
        from huggingface_hub import HfApi

        self.kind = kind
        self.name = name
        self.path = f"{path}/" if path else ""
        self._api = HfApi()

    def listing(self) -> dict[str, Stored]:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with self._explained():
            try:
                tree = list(
                    self._api.list_repo_tree(
                        self.name, self.path.rstrip("/") or None, recursive=True, repo_type=self.kind
                    )
                )
            except (EntryNotFoundError, RepositoryNotFoundError):
                return {}
        return {
            file.path.removeprefix(self.path): Stored(
                file.size, f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            )
            for file in tree
            if isinstance(file, RepoFile)
        }

    def send(self, files: Mapping[str, Source], done: Done) -> None:
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        with self._explained():
            self._api.create_repo(self.name, repo_type=self.kind, private=True, exist_ok=True)
            additions = []
            for name, source in files.items():
                addition = CommitOperationAdd(self.path + name, source)
                self._api.preupload_lfs_files(self.name, [addition], repo_type=self.kind)
                additions.append(addition)
                done(size_of(source))
            self._api.create_commit(
                self.name, additions, commit_message=f"Push {len(files)} files", repo_type=self.kind
            )

    def receive(self, name: str, path: Path, done: Done) -> None:
        with self._explained(), TemporaryDirectory(dir=path.parent, prefix=".hub.") as scratch:
            file = self._api.hf_hub_download(self.name, self.path + name, repo_type=self.kind, local_dir=scratch)
            shutil.move(file, path)
        done(path.stat().st_size)

    def remove(self, name: str) -> None:
        with self._explained():
            self._api.delete_file(self.path + name, self.name, repo_type=self.kind)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the client raises, as one line and the command that mends it."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

        where, again = f"hf://{self.name}", "the same command again sends what is missing"
        try:
            yield
        except LocalTokenNotFoundError:
            raise UserError("not logged in to the Hub", where=where, hint=LOGIN) from None
        except HFValidationError as error:
            raise UserError(str(error), where=where, hint="hf://OWNER/NAME") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401:
                raise UserError("not logged in to the Hub", where=where, hint=LOGIN) from None
            if status == 403:
                hint = f"a token that may write to {self.name}: {LOGIN}"
                raise UserError("your token may not write there", where=where, hint=hint) from None
            raise UserError(" ".join(str(error).split()), where=where, hint=again, code=Exit.FAILED) from None
        except (OSError, RuntimeError) as error:
            raise UserError(" ".join(str(error).split()), where=where, hint=again, code=Exit.FAILED) from None


def connect(place: str) -> Repository:
    """The files of `owner/name/path`, a model's, or of `datasets/owner/name/path`.

    Raises:
        UserError: no repository is named.
    """
    parts = place.strip("/").split("/")
    kind = "dataset" if parts[0] == "datasets" else "model"
    owner_and_name, path = (parts[1:3], parts[3:]) if kind == "dataset" else (parts[:2], parts[2:])
    if len(owner_and_name) != 2 or not all(owner_and_name):
        raise UserError("no repository is named", where=f"hf://{place}", hint="hf://OWNER/NAME")
    return Repository(kind, "/".join(owner_and_name), "/".join(path))
