"""`gs://bucket/path`: Cloud Storage.

Files above 8 MB go as a resumable upload, each checked by its CRC32C; one that somebody else replaces meanwhile is not
overwritten. Credentials are Google's application default ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from dpo_cli.errors import Exit, UserError
from dpo_cli.storage import Done, Source, Stored

PART = 5 << 20  # bytes a request, a multiple of 256 KiB
LOGIN = "gcloud auth application-default login"


class Bucket:
    """The objects under a prefix of a bucket."""

    atomic = False

    def __init__(self, bucket: str, prefix: str) -> None:
        self.name = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self._generations: dict[str, int] = {}
        with self._explained():
            from google.cloud import storage

            self.bucket: Any = storage.Client().bucket(bucket)

    def listing(self) -> dict[str, Stored]:
        with self._explained():
            blobs = [blob for blob in self.bucket.list_blobs(prefix=self.prefix) if not blob.name.endswith("/")]
        self._generations = {blob.name: blob.generation for blob in blobs}
        return {blob.name.removeprefix(self.prefix): Stored(blob.size, f"crc32c:{blob.crc32c}") for blob in blobs}

    def send(self, files: Mapping[str, Source], done: Done) -> None:
        for name, source in files.items():
            blob = self.bucket.blob(self.prefix + name, chunk_size=PART)
            with self._explained(), _open(source) as file:
                blob.upload_from_file(
                    _Counted(file, done),
                    checksum="crc32c",
                    if_generation_match=self._generations.get(blob.name, 0),
                    size=file.seek(0, 2) - file.seek(0),
                )
            self._generations[blob.name] = blob.generation

    def receive(self, name: str, path: Path, done: Done) -> None:
        with path.open("wb") as file, self._explained():
            self.bucket.blob(self.prefix + name).download_to_file(_Counted(file, done), checksum="crc32c")

    def remove(self, name: str) -> None:
        with self._explained():
            self.bucket.blob(self.prefix + name).delete()
        self._generations.pop(self.prefix + name, None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the client raises, as one line and the command that mends it."""
        from google.api_core import exceptions as api
        from google.auth import exceptions as auth
        from google.cloud.storage.exceptions import DataCorruption
        from requests.exceptions import RequestException

        where, again = f"gs://{self.name}", "the same command again sends what is missing"
        try:
            yield
        except (auth.DefaultCredentialsError, auth.RefreshError, api.Unauthorized):
            raise UserError("not logged in to Google Cloud", where=where, hint=LOGIN) from None
        except api.NotFound:
            hint = f"gcloud storage buckets create {where} --location=us-central1"
            raise UserError("no such bucket", where=where, hint=hint) from None
        except api.Forbidden:
            hint = f"gcloud storage buckets add-iam-policy-binding {where} --role=roles/storage.objectUser --member=YOU"
            raise UserError("you may not read or write there", where=where, hint=hint) from None
        except api.PreconditionFailed:
            message = "a file was replaced by somebody else in the meantime"
            raise UserError(message, where=where, hint=again, code=Exit.FAILED) from None
        except DataCorruption:
            message = "a file arrived with another checksum"
            raise UserError(message, where=where, hint=again, code=Exit.FAILED) from None
        except (api.GoogleAPICallError, api.RetryError, auth.TransportError, RequestException) as error:
            text = " ".join(str(error).split())
            raise UserError(text, where=where, hint=again, code=Exit.FAILED) from None


class _Counted:
    """A binary file whose reads and writes are told to `done`."""

    def __init__(self, file: IO[bytes], done: Done) -> None:
        self._file = file
        self._done = done

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._done(len(block))
        return block

    def write(self, block: bytes) -> int:
        self._done(len(block))
        return self._file.write(block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def connect(place: str) -> Bucket:
    """The objects of `bucket/path`.

    Raises:
        UserError: no bucket is named, or nobody is logged in.
    """
    bucket, _, prefix = place.partition("/")
    if not bucket:
        raise UserError("no bucket is named", where="gs://", hint="gs://BUCKET/PATH")
    return Bucket(bucket, prefix.strip("/"))


def _open(source: Source) -> IO[bytes]:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")
