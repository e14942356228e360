"""The packed forward against TRL's own: losses, gradients, metrics, evaluation, generation, parts, fallbacks."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from packing import PAIRS, Packed, Plain, assert_equal, configuration, make, outcome, rows
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.errors import UserError
from dpo_cli.training.forward import attention, collator, fused_lora, packed
from dpo_cli.training.forward import log_probs as head

torch.set_num_threads(1)

ARCHITECTURES = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Llama, no groups": {"num_key_value_heads": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 64},
    "Mistral": {"sliding_window": None},
}
LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def both(folder, config, tokens_per_batch=None, **arguments):
    """(our trainer, what ours comes to, what TRL's comes to)."""
    theirs = outcome(make(Plain, folder, config, **arguments))
    trainer = make(Packed, folder, config, **arguments)
    assert packed.enable(trainer, tokens_per_batch) is None
    return trainer, outcome(trainer), theirs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_come_to_what_trl_comes_to(tmp_path, name):
    _, ours, theirs = both(tmp_path, configuration(name.partition(",")[0], **ARCHITECTURES[name]))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_come_to_what_trl_comes_to(tmp_path, loss):
    _, ours, theirs = both(tmp_path, configuration("Llama"), loss_type=loss, label_smoothing=0.1)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"lora": False},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"use_weighting": True, "lora": False},
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3},
    ],
    ids=str,
)
def test_settings_come_to_what_trl_comes_to(tmp_path, arguments):
    _, ours, theirs = both(tmp_path, configuration("Llama"), **arguments)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_divided_batch_comes_to_what_trls_undivided_one_does(tmp_path, budget):
    trainer, ours, theirs = both(tmp_path, configuration("Llama"), budget)
    assert_equal(ours, theirs)
    batch = trainer.data_collator(PAIRS)
    divided = [part for _, part in collator.micro_batches(batch)]
    assert all(len(part["packing"]["tokens"]) <= budget or len(part["input_ids"]) == 2 for part in divided)
    assert len(divided) in {1: [len(PAIRS)], 40: range(3, 7), 10_000: [1]}[budget]


def test_parts_of_a_model_left_to_trl_count_their_padding(tmp_path):
    theirs = outcome(make(Plain, tmp_path, configuration("Granite", logits_scaling=8.0)))
    trainer = make(Packed, tmp_path, configuration("Granite", logits_scaling=8.0))
    assert "differ" in packed.enable(trainer, 60)
    assert_equal(outcome(trainer), theirs)
    parts = [part["input_ids"] for _, part in collator.micro_batches(trainer.data_collator(PAIRS))]
    assert len(parts) > 2 and all(ids.numel() <= 60 or len(ids) == 2 for ids in parts)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_in_4_bits_come_to_what_trl_comes_to(tmp_path, checkpointing):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from dpo_cli.config.settings import TrainSection
    from dpo_cli.training.dpo import restore_precision
    from dpo_cli.training.trainer import keep_differentiable, load_base

    config = configuration("Llama", intermediate_size=128)  # a multiple of the 64 weights of a block
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=bits)

    arguments = {"load": load, "gradient_checkpointing": checkpointing}
    theirs, ours = (make(kind, tmp_path, config, **arguments) for kind in (Plain, Packed))
    for trainer in (theirs, ours):
        restore_precision(trainer.model)
        keep_differentiable(trainer.model)
    assert type(ours.model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert packed.enable(ours) is None  # its forwards take no gradient, as an evaluation's don't
    assert_equal(outcome(ours), outcome(theirs))
    loaded = load_base(tmp_path / "base", TrainSection(load_in_4bit=True)).modules()
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in loaded)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
def test_a_loss_over_the_whole_batch_is_not_divided(tmp_path, loss):
    with pytest.raises(UserError, match="no mean over pairs"):
        packed.enable(make(Packed, tmp_path, configuration("Llama"), loss_type=loss), 40)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
     ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16})],
)  # fmt: skip
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_mixtures_of_experts_come_to_what_trl_comes_to_their_balance_included(tmp_path, name, changes, coefficient):
    _, ours, theirs = both(tmp_path, configuration(name, **changes), router_aux_loss_coef=coefficient)
    assert_equal(ours, theirs)
    assert ("aux_loss" in ours["logged"]) == (coefficient > 0)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Mistral", {"sliding_window": 16}, "slides over 16 tokens"),
        ("Gemma3Text", {"head_dim": 16, "sliding_window": 16}, "layers of sliding_attention"),
        ("Gemma2", {"head_dim": 16, "sliding_window": 64}, "attention is eager"),
        ("Llama", {"attention_dropout": 0.1}, "attention dropout"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic position"),
        ("Granite", {"logits_scaling": 8.0}, "would differ by"),
    ],
)  # fmt: skip
def test_other_architectures_are_left_to_trl(tmp_path, name, changes, reason):
    theirs = outcome(make(Plain, tmp_path, configuration(name, **changes)))
    trainer = make(Packed, tmp_path, configuration(name, **changes))
    assert reason in packed.enable(trainer)
    assert "packing" not in trainer.data_collator(PAIRS)
    assert_equal(outcome(trainer), theirs)


def test_a_reference_of_its_own_computes_in_the_policys_precision(tmp_path):
    trainer = make(Packed, tmp_path, configuration("Llama"), lora=False, bf16=True)
    trainer.ref_model.load_state_dict(trainer.model.state_dict())
    assert packed.enable(trainer) is None
    logged = outcome(trainer)["logged"]
    assert logged["rewards/margins"] == logged["eval_rewards/margins"] == 0.0


class Waits(TorchDispatchMode):
    """Keeps the calls for which a host would have to wait for a device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = str(call)
        by_mask = "index" in name and any(
            index is not None and index.dtype == torch.bool for index in torch.utils._pytree.tree_leaves(args[1:2])
            if isinstance(index, torch.Tensor)
        )  # fmt: skip
        if by_mask or any(wait in name for wait in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.calls.append(name)
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_waits_for_nothing(tmp_path, checkpointing):
    arguments = {"loss_type": "ipo", "gradient_checkpointing": checkpointing}
    trls, ours = (make(kind, tmp_path, configuration("Llama"), **arguments) for kind in (Plain, Packed))
    assert packed.enable(ours, 60) is None
    counts = []
    for trainer in (trls, ours):
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        batch = trainer.data_collator(PAIRS)
        with Waits() as waits:
            trainer.training_step(trainer.model, batch)
        counts.append(waits.calls)
    assert len(counts[0]) > 12 and counts[1] == []


def test_padded_generation_is_as_before(tmp_path):
    trainer = make(Packed, tmp_path, configuration("Llama"))
    ids = torch.tensor([[0, 0, 0, 7, 9, 11], [5, 6, 7, 8, 9, 10]])
    arguments = {"input_ids": ids, "attention_mask": (ids > 0).long(), "do_sample": False, "max_new_tokens": 12}
    before = trainer.model.generate(**arguments, output_logits=True, return_dict_in_generate=True)
    assert packed.enable(trainer) is None
    after = trainer.model.generate(**arguments, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(one, other) for one, other in zip(before.logits, after.logits, strict=True))


def dense_mask(segments):
    """(T, T): who may see whom, from the ends that a variable-length call gets."""
    tokens = int(segments["query_ends"][-1])
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    query_ends, key_ends = segments["query_ends"].tolist(), segments["key_ends"].tolist()
    for run, (first, last) in enumerate(itertools.pairwise(query_ends)):
        keys = segments["keys"][key_ends[run] : key_ends[run + 1]]
        for query in range(first, last):
            mask[query, keys[: len(keys) - (last - first) + (query - first) + 1]] = True
    return mask


def test_a_plan_shows_each_token_what_stands_before_it_in_its_row(tmp_path):
    batch = make(Plain, tmp_path, configuration("Llama")).data_collator(PAIRS)
    plan = collator.plan_pairs(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ids, mask = batch["input_ids"].flatten()[plan["tokens"]], dense_mask(plan["segments"])
    width = batch["input_ids"].shape[1]
    scored = {}
    for place, target in zip(plan["scored"].tolist(), plan["targets"].tolist(), strict=True):
        row, column = divmod(target, width - 1)
        scored[row, column + 1] = ids[mask[place]].tolist()
        assert plan["positions"][0][mask[place]].tolist() == list(range(column + 1))
    completions = batch["completion_mask"].nonzero().tolist()
    assert scored == {(row, at): batch["input_ids"][row, :at].tolist() for row, at in completions}
    beginnings = {
        (number, *(row["prompt_ids"] + row[side])[:end])
        for number, row in enumerate(PAIRS)
        for side in ("chosen_ids", "rejected_ids")
        for end in range(1, len(row["prompt_ids"] + row[side]))
    }
    assert len(ids) == len(beginnings)  # what begins alike is there once, what predicts nothing is not there
    assert plan["segments"]["most_keys"] == max(plan["segments"]["key_ends"].diff())
    assert plan["segments"]["most_queries"] == max(plan["segments"]["query_ends"].diff())


@pytest.mark.parametrize("key_heads", [4, 2])
def test_split_attention_is_attention_under_the_dense_mask(key_heads):
    chosen, rejected, shared = torch.tensor([9, 4, 6]), torch.tensor([7, 8, 6]), torch.tensor([5, 4, 6])
    segments = attention.pair_segments(chosen, rejected, shared)
    tokens = int(segments["query_ends"][-1])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 8) for heads in (4, key_heads, key_heads))
    ours = attention.split_attention(query, key, value, segments, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(segments), scale=0.3, enable_gqa=key_heads < 4
    )
    assert torch.allclose(ours, theirs.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_call_for_cuda_fits_torchs_signature_forward_and_backward(key_heads):
    segments = attention.pair_segments(torch.tensor([9, 4]), torch.tensor([7, 8]), torch.tensor([5, 4]))
    query, key, value = (
        torch.empty(1, heads, 19, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, key_heads, key_heads)
    )
    for name in ("keys", "query_ends", "key_ends"):
        segments[name] = segments[name].to("meta")
    output = attention.varlen_attention(query, key, value, segments, 0.1)
    output.sum().backward()
    assert output.shape == (1, 19, 4, 64)
    assert key.grad.shape == (1, key_heads, 19, 64) and query.grad.shape == (1, 4, 19, 64)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"split_attention": 1.0, "varlen_attention": 2.0}, "split_attention"),
        ({"split_attention": 2.0, "varlen_attention": 1.0}, "varlen_attention"),
        ({"split_attention": 2.0, "varlen_attention": RuntimeError("no kernel for this card")}, "split_attention"),
        ({"split_attention": ValueError(), "varlen_attention": ImportError()}, "split_attention"),
    ],
    ids=["split", "varlen", "no varlen", "neither"],
)
def test_on_cuda_the_faster_kernel_that_runs_is_chosen(monkeypatch, seconds, chosen):
    def time_of(kernel, *_):
        if isinstance(seconds[kernel.__name__], Exception):
            raise seconds[kernel.__name__]
        return seconds[kernel.__name__]

    monkeypatch.setattr(attention, "_time", time_of)
    attention._kernel.cache_clear()
    assert attention._kernel(torch.device("cuda"), torch.bfloat16, 4, 2, 64).__name__ == chosen
    attention._kernel.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kernel", [attention.split_attention, attention.varlen_attention])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_kernels_on_cuda_are_attention_under_the_dense_mask(kernel, key_heads):
    segments = attention.pair_segments(torch.tensor([90, 40]), torch.tensor([70, 80]), torch.tensor([50, 40]))
    mask = dense_mask(segments).cuda()
    for name in ("keys", "query_ends", "key_ends"):
        segments[name] = segments[name].cuda()
    torch.manual_seed(0)
    states = [torch.randn(1, heads, len(mask), 64, device="cuda") for heads in (4, key_heads, key_heads)]
    outcomes = []
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value = (state.to(dtype).requires_grad_() for state in states)
        if dtype == torch.bfloat16:
            out = kernel(query, key, value, segments, 0.1)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=0.1, enable_gqa=key_heads < 4
            ).transpose(1, 2)
        out.float().square().sum().backward()
        outcomes.append([out, query.grad, key.grad, value.grad])
    for ours, theirs in zip(*outcomes, strict=True):
        assert (ours.float() - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_run_on_cuda_comes_to_what_trl_comes_to(tmp_path):
    on_cuda = {"use_cpu": False, "bf16": True}
    theirs = outcome(make(Plain, tmp_path, configuration("Llama"), **on_cuda))
    trainer = make(Packed, tmp_path, configuration("Llama"), **on_cuda)
    assert packed.enable(trainer) is None
    assert abs(outcome(trainer)["logged"]["loss"] - theirs["logged"]["loss"]) < 1e-2


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_frozen_head_comes_to_what_trls_head_comes_to(needs_grad, monkeypatch):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    monkeypatch.setattr(head, "TILE", 3 * 50)
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    targets = torch.randint(0, 50, (11,))
    hidden, same = (3 * torch.randn(11, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    hidden.requires_grad_(needs_grad), same.requires_grad_(needs_grad)
    ours = head.score(hidden, layer, targets, None, metrics=True)
    log_probs, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
        same, layer.weight, None, targets, 1.0, 50, None, 1.0, head.METRICS
    )
    for one, other in zip(ours[:4], (log_probs, entropy, mean_logits, is_top1), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)
    if needs_grad:
        weights = torch.randn(11)
        (ours.log_probs * weights).sum().backward(), (log_probs * weights).sum().backward()
        assert torch.allclose(hidden.grad, same.grad, rtol=2e-5, atol=1e-6)


def test_a_long_row_is_seen_before_a_window_closes(tmp_path):
    pairs = rows([(40, 5, 5), (3, 3, 3)])
    assert packed.enable(make(Packed, tmp_path, configuration("Mistral", sliding_window=45), pairs)) is None
    assert "44" in packed.enable(make(Packed, tmp_path, configuration("Mistral", sliding_window=44), pairs))


@pytest.mark.parametrize("change", ["none", "dropout", "two adapters", "no adapter", "bfloat16", "autocast"])
def test_fused_lora_layers_come_to_what_pefts_come_to(change):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 12, bias=True), torch.nn.Linear(12, 6, bias=False))
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(network, settings)
    model.add_adapter("ref", settings)
    if change == "dropout":
        for layer in (model.base_model.model[0], model.base_model.model[1]):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    elif change == "two adapters":
        model.base_model.set_adapter(["default", "ref"])
    elif change == "bfloat16":
        network.to(torch.bfloat16)
        for name, value in model.named_parameters():
            value.data = value.data.float() if "lora" in name else value.data
    rows = torch.randn(2, 5, 8, dtype=torch.bfloat16 if change == "bfloat16" else torch.float32)

    def outcome():
        torch.manual_seed(1)
        model.zero_grad()
        off = model.disable_adapter() if change == "no adapter" else nullcontext()
        with off, torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            out = model(rows)
        if change != "no adapter":
            out.float().square().sum().backward()
        return [out, *(value.grad for value in model.parameters() if value.grad is not None)]

    theirs = outcome()
    fused_lora.fuse(model)
    ours = outcome()
    most = 2e-2 if change == "autocast" else 1e-6
    assert len(theirs) == (1 if change == "no adapter" else 9 if change == "two adapters" else 5)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= most * other.norm()
    fused_lora.restore(model)
    assert all(torch.equal(one, other) for one, other in zip(outcome(), theirs, strict=True))
