"""Numbers for the log that stay on the device until somebody reads them.

TRL's `_compute_loss` ends in a dozen `.item()`, each of which makes the host wait for the device before the backward
pass is even queued. Here `.item()` gives the tensor back, and `read` brings all of them over in one transfer. Reads
and writes no files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class DeferredMetric(Tensor):
    """A tensor for metrics alone, of which the device is asked nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` as for a tensor, except for calls that would make the host wait for a value."""
        if func is Tensor.item:
            return args[0]
        if func is Tensor.__bool__:  # TRL asks whether there is a completion token: there is
            return True
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return torch.where(args[1], args[0], 0)  # selected to be summed up; how many they are is not known
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def defer(values: Tensor) -> Tensor:
    """A detached view of `values` whose `.item()` gives the tensor back; `read` makes numbers of it."""
    return values.detach().as_subclass(DeferredMetric)


@contextmanager
def metrics(accelerator: Any) -> Iterator[None]:
    """Context in which what is gathered for metrics is read later."""
    names = ("gather", "gather_for_metrics")
    gather = {name: getattr(accelerator, name) for name in names}
    for name, theirs in gather.items():
        setattr(accelerator, name, lambda values, theirs=theirs: defer(theirs(values.as_subclass(Tensor))))
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


def read(numbers: list[Any]) -> list[Any]:
    """Floats for the tensors among them, in one transfer; what is a number already stays as it is."""
    tensors = [number.detach().as_subclass(Tensor).double() for number in numbers if isinstance(number, Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(values) if isinstance(number, Tensor) else number for number in numbers]
