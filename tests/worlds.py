"""A small world in which the true reward is known: a tiny SFT adapter, and answers whose worth can be counted.

A prompt names three words of a topic; an answer is some words, about a quarter of them from the list `ZEST`. The true
reward is the share of those, whatever the topic and however long the answer. What must not be lost is the topic. The
world is made and trained by the package's own stages; what came of it is measured here with plain transformers, so
that a fault of the package's own sampling or KL would show.
"""

import hashlib
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.reader import parse_rows
from dpo_cli.progress import Silent
from dpo_cli.stages import generate, judge, train
from dpo_cli.stages.evaluate.win_rate import win_rate
from dpo_cli.stages.pair import run
from dpo_cli.statistics import bootstrap
from dpo_cli.training.run_history import Trained

ZEST = ["crisp", "daring", "fizzy", "keen", "lively", "peppery", "sunny", "zippy"]
PLAIN = ["again", "beside", "from", "later", "often", "quite", "still", "under"]
TOPICS = [words.split() for words in (
    "anchor harbor rope sail tide wave", "barn cow field hay horse plough", "bread butter oven salt soup spoon",
    "canvas clay easel ink paint pencil", "drill hammer nail plank saw wrench", "bow drum flute horn piano violin",
    "fern leaf moss oak pine root", "cloud fog frost rain snow wind",
)]  # fmt: skip
ZEST_SHARE = (0.0, 0.5)
TOPIC_SHARE = 0.7  # of the others
WORDS = (6, 14)

SETTINGS = {
    "model.name": "world", "model.dpo_name": "world-dpo", "generate.engine": "transformers", "generate.n": 4,
    "generate.max_tokens": 40, "generate.temperature": 1.0, "generate.frequency_penalty": 0.0,
    "generate.batch_size": 128, "judge.judge": "function",
    "sft.learning_rate": 3e-3, "sft.per_device_train_batch_size": 32, "sft.gradient_accumulation_steps": 1,
    "sft.num_train_epochs": 2, "sft.warmup_steps": 5, "sft.r": 8, "sft.lora_alpha": 16.0,
    "train.learning_rate": 2e-4, "train.beta": 0.1, "train.per_device_train_batch_size": 16,
    "train.per_device_eval_batch_size": 64, "train.gradient_accumulation_steps": 1, "train.num_train_epochs": 1,
    "train.warmup_steps": 5, "train.eval_steps": 1000, "train.save_steps": 1000,
    "gate.kl_limit": 1000.0,  # what is measured here is what happens without the brake
}  # fmt: skip


class Sizes(Struct):
    """Texts of the base, its width and steps; demonstrations; prompts to train on, and to be measured on."""

    base: int = 6000
    hidden: int = 96
    steps: int = 600
    demonstrations: int = 1024
    prompts: int = 1024
    measured: int = 256


class Point(Struct, kw_only=True):
    """Policy against SFT adapter, by the true reward; intervals are 95% by prompt.

    `kl` is KL(policy || SFT adapter) in nats an answer, `topical` the share of the words without zest that are of the
    prompt's topic, `words` an answer's length.
    """

    reward: float
    win_rate: float
    interval: tuple[float, float]
    kl: float
    topical: float
    words: float


def zest(prompt: list[dict[str, str]], completion: str) -> float:
    """The true reward, from 0 to 10: ten times the share of words with zest."""
    words = completion.split()
    return 10 * sum(word in ZEST for word in words) / max(len(words), 1)


def flipped(share: float) -> Callable[[list[dict[str, str]], str], float]:
    """A judge that for this share of the prompts likes best what is worst."""

    def score(prompt: list[dict[str, str]], completion: str) -> float:
        draw = int(hashlib.sha256(prompt[-1]["content"].encode()).hexdigest()[:8], 16) / 2**32
        return -zest(prompt, completion) if draw < share else zest(prompt, completion)

    return score


flipped_10, flipped_20, flipped_30, coin, swapped = (flipped(share) for share in (0.1, 0.2, 0.3, 0.5, 1.0))


def topical(prompt: str, completion: str) -> float:
    """Share of the words without zest that belong to the prompt's topic."""
    named = set(prompt.split())
    [words] = [topic for topic in TOPICS if named & set(topic)]
    rest = [word for word in completion.split() if word not in ZEST]
    return sum(word in words for word in rest) / len(rest) if rest else 0.0


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompt-completion rows, no prompt twice; different seeds draw from different prompts."""
    draw = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        topic = draw.choice(TOPICS)
        prompt = "tell of " + " ".join(draw.sample(topic, draw.randint(3, 5)))
        share = draw.uniform(*ZEST_SHARE)
        weights = share, (1 - share) * TOPIC_SHARE, (1 - share) * (1 - TOPIC_SHARE)
        lists = draw.choices([ZEST, topic, PLAIN], weights, k=draw.randint(*WORDS))
        rows[prompt] = {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": " ".join(map(draw.choice, lists))}],
        }
    return list(rows.values())


def make(folder: Path, sizes: Sizes | None = None, seed: int = 0) -> Config:
    """Base model, SFT adapter, prompts and completions in `folder`, with the settings that use them.

    None of the prompts is in two of the files. What is there already stays.
    """
    from dpo_cli.demo import tiny

    sizes = sizes or Sizes()
    config = resolve(
        SETTINGS | {
            "data": str(folder / "data"), "runs": str(folder / "runs"), "model.base": str(folder / "base"),
            "model.adapter": str(folder / "sft"), "model.dpo_adapter": str(folder / "dpo"),
            "generate.prompts": str(folder), "judge.function": f"{Path(__file__).resolve()}:zest",
        },
        environment={},
    ).config  # fmt: skip
    rows = iter(examples(sizes.demonstrations + sizes.prompts + sizes.measured, seed))
    for name, count in (("train", sizes.demonstrations), ("val", sizes.prompts), ("measured", sizes.measured)):
        write_rows(folder / f"{name}.jsonl", [next(rows) for _ in range(count)])
    shown = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in examples(sizes.base, seed=-1)]
    texts = ["\n".join(one) for one in shown]
    if not (folder / "base").exists():
        unfinished = folder / "unfinished"
        tiny.make_base(unfinished, texts, vocabulary=448, hidden=sizes.hidden, heads=sizes.hidden // 32, context=128)
        tiny.pretrain(unfinished, texts, Silent(), steps=sizes.steps)
        unfinished.rename(folder / "base")
    train.run(config, Silent(), stage="sft", name="sft")
    generate.run(config, Silent())
    return config


def align(
    config: Config,
    name: str,
    label: str = "zest",
    beta: float = 0.1,
    learning_rate: float | None = None,
    sets: Mapping[str, Any] | None = None,
    before: str | None = None,
) -> tuple[Config, Trained]:
    """DPO by the stages: judge the world's completions, pair them and train, in folders of their own.

    Args:
        config: of `make`.
        name: of the folders.
        label: the judging function: `zest`, or one that errs.
        beta: strength of the pull towards the SFT adapter.
        learning_rate: unset: the world's.
        sets: dotted keys of `[pair]` and `[train]` with values, which win.
        before: adapter of the round before, which gives the completions and is the reference; unset: the SFT adapter.
    """
    data = Path(config.data).with_name(f"data-{name}")
    data.mkdir(exist_ok=True)
    if before is None:
        shutil.copyfile(Path(config.data) / "completions.jsonl", data / "completions.jsonl")
    own: dict[str, dict[str, Any]] = {"pair": {}, "train": {"beta": beta}}
    if learning_rate is not None:
        own["train"]["learning_rate"] = learning_rate
    for key, value in (sets or {}).items():
        section, _, field = key.partition(".")
        own[section][field] = value
    mine = replace(
        config, data=str(data),
        model=replace(config.model, adapter=before or config.model.adapter, dpo_adapter=str(data / "adapter")),
        judge=replace(config.judge, function=f"{Path(__file__).resolve()}:{label}"),
        pair=replace(config.pair, **own["pair"]),
        train=replace(config.train, **own["train"]),
    )  # fmt: skip
    if before is not None:
        generate.run(replace(mine, generate=replace(mine.generate, seed=mine.generate.seed + 1)), Silent())
    judge.run(mine, Silent())
    run.run(mine)
    return mine, train.run(mine, Silent(), name=name)


class Judged:
    """The world's own eyes: samples and log-probabilities by plain transformers, reference samples drawn once."""

    def __init__(self, config: Config, samples: int = 4, seed: int = 0) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.samples, self.seed = samples, seed
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.base)
        self.base = lambda: AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32)
        rows = [row for _, row in parse_rows(Path(config.generate.prompts) / "measured.jsonl", dict)]
        self.prompts = [row["prompt"][0]["content"] for row in rows]
        self.reference = self.load(str(config.model.adapter))
        self.answers, _ = self._sample(self.reference, seed)

    def load(self, adapter: str) -> Any:
        """Base and adapter, by PEFT alone."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.base(), adapter).eval()

    def point(self, adapter: str) -> Point:
        """How the adapter does on the prompts that nothing was trained or tuned on."""
        policy = self.load(adapter)
        answers, ids = self._sample(policy, self.seed + 1)
        wins = [win_rate(_rewards(theirs), _rewards(ours)) for theirs, ours in zip(self.answers, answers, strict=True)]
        return Point(
            win_rate=fmean(wins), interval=_interval(wins), kl=fmean(self._kl(policy, ids)),
            reward=fmean(reward for texts in answers for reward in _rewards(texts)),
            topical=fmean(topical(*one) for one in self._each(answers)),
            words=fmean(len(text.split()) for _, text in self._each(answers)),
        )  # fmt: skip

    def best_of(self, count: int) -> Point:
        """The best of `count` answers of the SFT adapter, by the true reward; its KL is the analytic bound."""
        drawn = [self._sample(self.reference, self.seed + 2 + number)[0] for number in range(count)]
        best = [
            [max(texts, key=lambda text: zest([], text)) for texts in zip(*rounds, strict=True)]
            for rounds in zip(*drawn, strict=True)
        ]
        wins = [win_rate(_rewards(theirs), _rewards(ours)) for theirs, ours in zip(self.answers, best, strict=True)]
        return Point(
            win_rate=fmean(wins), interval=_interval(wins), kl=best_of_kl(count),
            reward=fmean(reward for texts in best for reward in _rewards(texts)),
            topical=fmean(topical(*one) for one in self._each(best)),
            words=fmean(len(text.split()) for _, text in self._each(best)),
        )  # fmt: skip

    def log_probs(self, model: Any, prompt: str, answer: str) -> Any:
        """Log-probability of each token of an answer, the stop token included: (tokens,)."""
        import torch

        head = self._encode(prompt)
        ids = head + self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(head) - 1 : -1]
        return logits.log_softmax(-1)[range(len(ids) - len(head)), ids[len(head) :]]

    def _encode(self, prompt: str) -> list[int]:
        message = [{"role": "user", "content": prompt}]
        ids: list[int] = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids

    def _each(self, answers: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
        return [(prompt, text) for prompt, texts in zip(self.prompts, answers, strict=True) for text in texts]

    def _sample(self, model: Any, seed: int) -> tuple[list[list[str]], Any]:
        """Answers by prompt, and (prompt tokens, answer tokens) of each, at temperature 1."""
        import torch

        heads = [self._encode(prompt) for prompt in self.prompts for _ in range(self.samples)]
        batch = self.tokenizer.pad({"input_ids": heads}, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=40)
        end = self.tokenizer.eos_token_id
        tails = [row[: row.index(end) + 1] if end in row else row for row in output[:, width:].tolist()]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return [texts[at : at + self.samples] for at in range(0, len(texts), self.samples)], (heads, tails)

    def _kl(self, policy: Any, ids: Any) -> list[float]:
        """KL(policy || SFT adapter) of each answer, summed over the whole vocabulary at each of its tokens, in nats."""
        import torch

        heads, tails = ids
        rows = self.tokenizer.pad({"input_ids": [head + tail for head, tail in zip(*ids, strict=True)]},
                                  padding_side="right", return_tensors="pt")  # fmt: skip
        with torch.inference_mode():
            ours, theirs = (model(**rows).logits.log_softmax(-1) for model in (policy, self.reference))
            each = (ours.exp() * (ours - theirs)).sum(-1)
        return [
            each[at, len(head) - 1 : len(head) + len(tail) - 1].sum().item()
            for at, (head, tail) in enumerate(zip(heads, tails, strict=True))
        ]


def _interval(wins: Sequence[float]) -> tuple[float, float]:
    rate = bootstrap(wins, 2000, seed=0)
    return rate.low, rate.high


def _rewards(texts: Sequence[str]) -> list[float]:
    return [zest([], text) for text in texts]


def best_of_kl(count: float) -> float:
    """KL of the best of N from one, in nats; an upper bound that is nearly reached (arXiv:2401.01879)."""
    return math.log(count) - (count - 1) / count


def best_of_rate(kl: float) -> float:
    """Win rate of the best of N against one, N/(N+1), for the N, whole or not, whose KL this is."""
    low, high = 1.0, 2.0
    while best_of_kl(high) < kl:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if best_of_kl(middle) < kl else (low, middle)
    return low / (low + 1)
