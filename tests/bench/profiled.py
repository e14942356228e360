"""Where a step's time goes, by kind of operation: `torch.profiler` over one call.

On a CPU the time is that of each operation itself, without those it calls; on a GPU that of its kernels. What happens
within attention or the optimizer counts as theirs. `rest` is views, reads and Python between the operations; a kernel
that is no operation of torch (Triton's) is there too. Attention in bfloat16 on a CPU is plain products and elementwise
work of ours, and counts as those.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: it says that it starts and stops

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# Of the first kind that an operation's name matches.
KINDS = {
    "optimizer": r"Optimizer\.step",
    "attention backward": r"attention.*_backward|_?varlen_attn_backward|_attn_backward",
    "attention forward": r"aten::.*attention|varlen_attn|_flash_attn",
    "products": r"aten::(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|_grouped_mm|mkldnn_\w+)_?$|mkldnn::|bitsandbytes::",
    "exponentials": r"aten::(_?softmax|_?log_softmax|_(log_)?softmax_backward_data|exp|logsumexp)_?$",
    "copies": r"aten::(copy|cat|stack|clone|index|index_select|index_put|_index_put_impl|index_add|index_copy|gather|"
    r"scatter|scatter_add|embedding\w*|repeat|repeat_interleave|fill|zero|slice_backward|select_backward|arange)_?$",
    "elementwise": r"aten::(add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|abs|sin|cos|silu|silu_backward|gelu\w*|"
    r"sigmoid\w*|tanh\w*|log|log_sigmoid\w*|where|masked_fill|lt|le|gt|ge|eq|ne|bitwise_\w+|sum|mean|amax|max|argmax|"
    r"cumsum|addcmul|addcdiv|lerp|clamp\w*|_foreach\w+|norm|linalg_vector_norm)_?$",
}
CONVERSIONS = "conversions"
REST = "rest"
COLUMNS = ["products", "attention forward", "attention backward", "elementwise", "exponentials", CONVERSIONS, "copies",
           "optimizer", REST]  # fmt: skip


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Share of one call's time that goes into each of COLUMNS, of the GPU's time where there is one."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, record_shapes=True) as profiled, record_function("step"):
        step()
    # The dtypes of what an operation takes are in the recording alone.
    recorded = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    dtypes = {event.correlation_id(): event.dtypes() for event in recorded if event.name() == "aten::copy_"}
    times = dict.fromkeys(COLUMNS, 0.0)
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is its operation's
            time = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[_kind(event, dtypes.get(event.id, []))] += time
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def _kind(event: Any, dtypes: list[str]) -> str:
    for name in _callers(event):
        for whole in ("optimizer", "attention backward", "attention forward"):
            if re.search(KINDS[whole], name):
                return whole
    if len(set(dtypes[:2])) > 1:
        return CONVERSIONS
    return next((kind for kind, names in KINDS.items() if re.match(names, event.name)), REST)


def _callers(event: Any) -> Iterator[str]:
    """Names of the operations within which an event lies, from the outermost to its own."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    # The engine's own events stand around a backward and name its forward.
    return reversed([name for name in names if not name.startswith("autograd::")])


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of the lines' `profile`, a share a column."""
    text = [f"| model | rows | variant | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 3)]
    for line in lines:
        parts = [f"{100 * line['profile'][kind]:.1f}%" for kind in COLUMNS]
        text.append(f"| {line['model']} | {line['rows']} | {line['variant']} | {' | '.join(parts)} |")
    return "\n".join(text)
