"""What a safetensors file says of its tensors, without torch: names, types, shapes, and whether all numbers are finite.

Reads headers, and bytes where values are asked for; writes nothing. Not covered: quantised types, whose bytes mean
something else.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from dpo_cli.errors import UserError

FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # bytes a number
LFS_POINTER = b"version https://git-lfs"
BLOCK = 1 << 24  # bytes read at once


class Tensor(Struct):
    """One entry of a safetensors header; offsets in bytes from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def check_no_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, which is what a clone without LFS leaves in place of a file.

    Raises:
        UserError: it is one.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError("is a Git LFS pointer, not the file itself", where=str(path), hint="git lfs pull")


def read_header(path: Path) -> dict[str, Tensor]:
    """Names, types, shapes and places of the tensors of a safetensors file.

    Raises:
        UserError: no such file, another format, or a file that is cut short.
    """
    try:
        check_no_pointer(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise UserError("not a safetensors file, or cut short", where=str(path))
            header = msgspec.json.decode(file.read(length), type=dict[str, object])
    except FileNotFoundError:
        raise UserError(f"no {path.name}", where=str(path.parent)) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"not a safetensors file: {error}", where=str(path)) from None
    header.pop("__metadata__", None)
    try:
        tensors = msgspec.convert(header, dict[str, Tensor])
    except msgspec.ValidationError as error:
        raise UserError(f"not a safetensors header: {error}", where=str(path)) from None
    for name, tensor in tensors.items():
        start, stop = tensor.data_offsets
        if tensor.dtype in FLOATS and math.prod(tensor.shape) * FLOATS[tensor.dtype] != stop - start:
            said = f"{name} has {stop - start} bytes for {tensor.shape} of {tensor.dtype}"
            raise UserError(f"not a safetensors header: {said}", where=str(path))
    end = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if end != size:
        raise UserError(f"{size} bytes instead of {end}: cut short, or still being written", where=str(path))
    return tensors


def check_finite(path: Path, tensors: dict[str, Tensor], zero: tuple[str, ...] = ()) -> bool:
    """Refuse weights that are not finite; tell whether any tensor with a name that holds one of `zero` is not zero.

    The last byte of a little-endian float holds its sign and the top of its exponent, which is full for NaN and
    infinity (and, but for F16, for values above 1e38).

    Raises:
        UserError: the tensor is named.
    """
    changes = False
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                continue
            file.seek(start + tensor.data_offsets[0])
            counts = any(part in name for part in zero)
            for block in read_blocks(file, tensor.data_offsets[1] - tensor.data_offsets[0]):
                if not is_finite(block, tensor.dtype):
                    raise not_finite(name, path)
                changes = changes or (counts and bool(block.strip(b"\0")))
    return changes


def not_finite(name: str, path: Path) -> UserError:
    """The error of a tensor that holds NaN or infinity."""
    hint = "take another copy of it, or train again from a checkpoint"
    return UserError(f"{name} holds NaN or infinity", where=str(path), hint=hint)


def read_blocks(file: IO[bytes], left: int) -> Iterator[bytes]:
    """The next `left` bytes of a file, a block of whole numbers at a time.

    Raises:
        EOFError: it ends before that.
    """
    while left:
        block = file.read(min(left, BLOCK))
        if not block:
            raise EOFError(f"{left} bytes are missing")
        left -= len(block)
        yield block


def is_finite(block: bytes, dtype: str) -> bool:
    """Whether all numbers of a block are finite, by the top bytes of their exponents."""
    width, full = FLOATS[dtype], 0x7C if dtype == "F16" else 0x7F
    finite = bytes(byte for byte in range(256) if byte & full != full)
    return not block[width - 1 :: width].translate(None, finite)
