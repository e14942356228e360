"""One trainer in a process of its own: the child of `train.py`, which tells it when to take a step.

A child makes the trainer of a variant, then answers `step`, `memory` and `fill` over a pipe. So no trainer's memory
is there beside another's, and steps of all variants take turns.
"""

import ctypes
import functools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import profiled
import torch
import trl.trainer.utils
from datasets import Dataset, disable_progress_bars
from msgspec import Struct
from packing import Packed, Plain, tokenizer
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama
from trl import DPOConfig, SFTConfig, SFTTrainer

from dpo_cli.progress import Silent
from dpo_cli.training.forward import packed, reference_cache
from dpo_cli.training.precision import keep_states_precise

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 8192},
    "large": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
              "num_key_value_heads": 2, "vocab_size": 8192},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "49k": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": 49152},
    "128k": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
             "num_key_value_heads": 2, "vocab_size": 128256},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
CUDA = torch.cuda.is_available()
# Of Liger: what `score` does not do itself.
LAYERS_ALONE = {"cross_entropy": False, "fused_linear_cross_entropy": False}
COMPACT = trl.trainer.utils._use_triton


class Variant(Struct, frozen=True):
    """What is measured.

    `ours` or TRL's trainer; `compact`: TRL scores completions only, as on a GPU; `kept`: the reference's
    log-probabilities are at hand; `grouped`: batches of like lengths; `liger`: TRL's `use_liger_kernel`, of ours its
    kernels of norms, SwiGLU and rotary embedding; `compiled`: the same by torch.compile; `bf16`: bfloat16 as each of
    the two has it on a CPU, ours with a base in it, TRL with autocast alone.
    """

    name: str
    ours: bool = False
    compact: bool = False
    kept: bool = False
    grouped: bool = False
    liger: bool = False
    compiled: bool = False
    bf16: bool = False


class PlainSft(SFTTrainer):
    """TRL's trainer; rows come encoded, and are taken in their order."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class PackedSft(packed.PackedSteps, PlainSft):
    """The same with our steps."""


class Child:
    """A trainer that steps when it is told to.

    Args:
        variant: what is measured.
        stage: dpo or sft.
        size: a key of MODELS, or a folder with a model.
        examples: rows of the dataset.
        batch: rows a step.
        folder: for files.
        rank: of the LoRA adapter.
        checkpointing: gradient checkpointing.
        bf16: bfloat16 compute; the base's weights are in it on a GPU, and on a CPU where it is ours.
    """

    def __init__(
        self, variant: Variant, stage: str, size: str, examples: list[dict[str, list[int]]], batch: int, folder: Path,
        rank: int, checkpointing: bool = CUDA, bf16: bool = CUDA,
    ) -> None:  # fmt: skip
        if variant.compact:
            trl.trainer.utils._use_triton = lambda device: True
        bf16 = bf16 or variant.bf16
        model = network(size, rank, CUDA or (bf16 and variant.ours))
        settings: dict[str, Any] = {
            "output_dir": str(folder), "bf16": bf16, "report_to": "none", "max_length": None,
            "gradient_checkpointing": checkpointing, "per_device_train_batch_size": batch, "learning_rate": 1e-4,
            "disable_tqdm": True, "use_liger_kernel": variant.liger and not variant.ours, "use_cpu": not CUDA,
        }  # fmt: skip
        if variant.grouped:
            examples = sorted(examples, key=lambda example: -sum(map(len, example.values())))
        began = clock()
        if stage == "dpo":
            kind: Any = Packed if variant.ours else Plain
            arguments: Any = DPOConfig(**settings, precompute_ref_log_probs=variant.kept and not variant.ours)
        else:
            kind = PackedSft if variant.ours else PlainSft
            arguments = SFTConfig(**settings)
        trainer = kind(
            model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer()
        )
        perturb(model)
        if variant.ours:
            reason = packed.enable(trainer)
            assert reason is None, reason
            began = clock()
            if variant.kept:
                reference_cache.keep_reference(trainer, folder / "reference", Silent(), wanted=True)
        self.fill = clock() - began if variant.kept else 0.0
        if variant.liger:
            apply_liger(trainer, LAYERS_ALONE if variant.ours else trainer.args.liger_kernel_config)
        if variant.compiled:
            compile_elementwise(model.get_base_model())
        if checkpointing:
            apply_checkpointing(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        # As `train` does, so that every variant computes under accelerate's autocast.
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.trainer = trainer
        self.data = trainer.train_dataset.to_list()

    def step(self, first: int, count: int) -> tuple[float, float]:
        """One optimizer step on some rows: seconds, and the loss."""
        began = clock()
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(self.data[first : first + count]))
        loss = self.trainer.training_step(self.model, batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        value = loss.item()
        if CUDA:
            torch.cuda.synchronize()
        return clock() - began, value

    def trim(self) -> None:
        """Give back what is free: of a large model each process would go on holding some gigabytes."""
        if not CUDA:
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def memory(self, first: int, count: int) -> float:
        """MB that a step takes at its peak over what was held before."""
        return peak_memory(lambda: self.step(first, count))

    def profile(self, first: int, count: int) -> dict[str, float]:
        """Share of a step's time by kind of operation."""
        return profiled.shares(lambda: self.step(first, count))

    def peak_gb(self) -> float:
        """GB that this process has held at most: of the card, else of itself."""
        if CUDA:
            return torch.cuda.max_memory_allocated() / 1e9
        return _status("VmHWM") / 1e3


def why_not(variant: Variant) -> str | None:
    """Why a variant can't be measured here; None: it can."""
    if variant.liger and find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if variant.liger and not CUDA:
        return "Liger's kernels need a card"
    return "no C++ compiler" if variant.compiled and not CUDA and not shutil.which("g++") else None


def apply_liger(trainer: Any, which: dict[str, bool] | None) -> None:
    """What `Trainer.train` does for `use_liger_kernel` before its first step, which steps alone do not."""
    apply_liger_kernel(trainer.model, which)
    forwards = [getattr(module.forward, "__func__", module.forward) for module in trainer.model.modules()]
    applied = sum(forward.__module__.startswith("liger_kernel") for forward in forwards)
    assert applied, "no module's forward is Liger's"


def compile_elementwise(model: Any) -> None:
    """Norms, SwiGLU and rotary embedding of a Llama, each as one kernel for rows of any length."""
    swiglu = torch.compile(lambda gate, up: torch.nn.functional.silu(gate) * up, dynamic=True)

    def forward(module: Any, states: torch.Tensor) -> torch.Tensor:
        return module.down_proj(swiglu(module.gate_proj(states), module.up_proj(states)))

    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.compile(dynamic=True)
        elif isinstance(module, modeling_llama.LlamaMLP):
            module.forward = functools.partial(forward, module)
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, dynamic=True)


def apply_checkpointing(trainer: Any) -> None:
    """What `Trainer.train` does for `gradient_checkpointing` before its first step, which steps alone do not."""
    trainer.model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=trainer.args.activation_checkpointing_kwargs
    )
    assert trainer.model.is_gradient_checkpointing


def clock() -> float:
    """Seconds; of one thread on a CPU those on the processor, to which the machine's other work counts little."""
    return time.perf_counter() if CUDA or torch.get_num_threads() > 1 else time.process_time()


def network(size: str, rank: int, bf16: bool = CUDA) -> Any:
    """A model with a random LoRA, always the same; `bf16`: its base's weights are bfloat16."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    if size in MODELS:
        settings = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        with torch.device("cuda" if CUDA else "cpu"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**MODELS[size], **settings), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(size, dtype=dtype)
        model.to("cuda" if CUDA else "cpu")
    weights = list(model.parameters())
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear", init_lora_weights=size not in MODELS)
    adapted = get_peft_model(model, lora)
    if bf16 and not CUDA:  # as `load_base` has it, except that LoRA starts from the same weights as over float32
        for weight in weights:
            weight.data = weight.data.bfloat16()
        keep_states_precise(model)
    return adapted


def perturb(model: Any) -> None:
    """Move the policy: at step zero every loss of DPO is ln 2, whatever is wrong."""
    with torch.no_grad():
        generator = torch.Generator(model.device).manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter += 0.01 * noise.to(parameter.dtype)


def peak_memory(step: Callable[[], Any]) -> float:
    """MB that one call takes at its peak; on a CPU it runs in a fork, whose memory starts as this process's.

    Not a number where the fork was killed.
    """
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def measure(connection: Any) -> None:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back at once
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = _status("VmRSS")
        step()
        connection.send(_status("VmHWM") - before)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs,))
    process.start()
    theirs.close()
    try:
        peak: float = ours.recv()
    except EOFError:  # killed, most likely for want of memory
        return float("nan")
    finally:
        process.join()
    return peak


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


def serve(connection: Any, *arguments: Any, **keywords: Any) -> None:
    """Make a Child and answer (method, arguments) until the other end closes."""
    quiet()
    child = Child(*arguments, **keywords)
    connection.send(child.fill)
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        connection.send(getattr(child, method)(*given))


class Remote:
    """A Child in another process; one more than this process's threads at most computes at once."""

    def __init__(self, variant: Variant, *arguments: Any, **keywords: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, variant, *arguments), kwargs=keywords)
        self._process.start()
        theirs.close()
        self.fill: float = self._receive()
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, first: int, count: int) -> None:
        """As the Child's; its seconds and its loss are kept."""
        self._connection.send(("step", (first, count)))
        seconds, loss = self._receive()
        self.seconds.append(seconds)
        self.losses.append(loss)

    def ask(self, method: str, *arguments: int) -> Any:
        """What a method of the Child returns."""
        self._connection.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            why = "killed, most likely for want of memory" if code == -signal.SIGKILL else "its error stands above"
            raise OSError(f"the process of {self.variant.name!r} ended with {code}: {why}") from None

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def quiet() -> None:
    """One thread as OMP_NUM_THREADS says, and nothing printed by libraries."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    disable_progress_bars()
