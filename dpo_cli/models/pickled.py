"""Names, types, shapes and finiteness of the tensors of a file that `torch.save` wrote, without torch or running it.

Only what tensors are made of is understood; every other object that the pickle names is refused. Reads; writes nothing.
Not covered: the format of before torch 1.6, which is no zip file.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from msgspec import Struct

from dpo_cli.errors import UserError
from dpo_cli.models.weights import FLOATS, Tensor, check_no_pointer, is_finite, not_finite, read_blocks

TYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
DAMAGED = (zipfile.BadZipFile, OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError)


class Place(Struct):
    """Where a tensor's numbers are: an entry of the zip file, from one byte to another."""

    entry: str
    start: int
    end: int


def is_legacy(path: Path) -> bool:
    """Whether a file is of the format of before torch 1.6, which is not understood here."""
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        UserError: it is no such file, is cut short, or holds something else than tensors.
    """
    return {name: tensor for name, (tensor, _) in _read(path).items()}


def check_finite_pickled(path: Path, zero: tuple[str, ...] = ()) -> bool:
    """As `weights.check_finite`, of a file that `torch.save` wrote.

    Raises:
        UserError: the tensor that holds NaN or infinity is named, or as `read_pickled`.
    """
    changes = False
    tensors = _read(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for name, (tensor, place) in tensors.items():
                if tensor.dtype not in FLOATS or place.end <= place.start:
                    continue
                counts = any(part in name for part in zero)
                with archive.open(place.entry) as file:
                    file.seek(place.start)
                    for block in read_blocks(file, place.end - place.start):
                        if not is_finite(block, tensor.dtype):
                            raise not_finite(name, path)
                        changes = changes or (counts and bool(block.strip(b"\0")))
    except DAMAGED as error:
        raise _damaged(path, error) from None
    return changes


def _read(path: Path) -> dict[str, tuple[Tensor, Place]]:
    check_no_pointer(path)
    try:
        with zipfile.ZipFile(path) as archive:
            inner = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if inner is None:
                raise UserError("not a file of torch.save", where=str(path))
            folder = inner.removesuffix("data.pkl") + "data/"
            found = _Reader(io.BytesIO(archive.read(inner)), folder).load()
    except DAMAGED as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict) or not all(isinstance(one, _Found) for one in found.values()):
        raise UserError("holds something else than tensors by name", where=str(path))
    return {str(name): (one.tensor, one.place) for name, one in found.items()}


def _damaged(path: Path, error: Exception) -> UserError:
    said = " ".join(str(error).split())
    return UserError(f"not a file of torch.save, or cut short: {said}", where=str(path))


class _Found(Struct):
    """A tensor, and where its numbers are."""

    tensor: Tensor
    place: Place


class _Storage(Struct):
    """What a pickle says of a storage: its type, and its entry of the zip file."""

    dtype: str
    entry: str


class _State(OrderedDict[str, Any]):
    """A state dict; what a module adds to it beside its tensors is dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, folder: str) -> None:
        super().__init__(file)
        self.folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _State
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            return TYPES.get(name, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, identity: Any) -> Any:
        return _Storage(str(identity[1]), f"{self.folder}{identity[2]}")


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Found:
    tensor = Tensor(storage.dtype, list(size), (0, 0))
    width = FLOATS.get(storage.dtype, 1)
    count = 0 if 0 in size else 1 + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
    return _Found(tensor, Place(storage.entry, offset * width, (offset + count) * width))
