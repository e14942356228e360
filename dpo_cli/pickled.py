"""Names, types and shapes of the tensors in a file that `torch.save` wrote, without torch and without running anything.

Only what tensors are made of is understood; every other object that the pickle names is refused. Reads; writes nothing.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from dpo_cli.errors import UserError
from dpo_cli.weights import Tensor, check_no_pointer

TYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; their places are not known.

    Raises:
        UserError: it is no such file, is cut short, or holds something else than tensors.
    """
    check_no_pointer(path)
    try:
        with zipfile.ZipFile(path) as archive:
            inner = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if inner is None:
                raise UserError("not a file of torch.save", where=str(path))
            found = _Reader(io.BytesIO(archive.read(inner))).load()
    except (zipfile.BadZipFile, OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise UserError(f"not a file of torch.save, or cut short: {error}", where=str(path)) from None
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise UserError("holds something else than tensors by name", where=str(path))
    return {str(name): tensor for name, tensor in found.items()}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name.endswith("Storage"):
            return TYPES.get(name, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, identity: Any) -> Any:
        return identity[1]


def _tensor(storage: str, offset: int, size: tuple[int, ...], *_: Any) -> Tensor:
    return Tensor(storage, list(size), (0, 0))
