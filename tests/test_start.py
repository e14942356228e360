"""What a command loads before it does anything; what it reads without typer or genai-prices agrees with them."""

import re
import subprocess
import sys

import pytest
import typer
from genai_prices import Usage as Tokens
from genai_prices import calc_price
from genai_prices.data import providers
from typer.core import TyperArgument, TyperOption

from dpo_cli import cli
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Completions, Preference
from dpo_cli.endpoint import price_table
from dpo_cli.endpoint.prices import price_of, table_date

PROMPT = [{"role": "user", "content": "Which tide?"}]
HEAVY = {
    "torch", "transformers", "trl", "peft", "datasets", "openai", "genai_prices", "yaml", "aiohttp", "pydantic",
    "httpx2", "numpy", "pyarrow",
}  # fmt: skip
LOADED = """
import sys
from dpo_cli.__main__ import main
sys.argv = ["nothing-dpo", *sys.argv[1:]]
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_BASE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    texts = ["The spring tide.", "No idea."]
    row = Completions(id="a", prompt=PROMPT, completions=texts, finish_reasons=["stop"] * 2, model="m", sampling={})
    write_rows(tmp_path / "completions.jsonl", [row])
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    write_rows(tmp_path / "train.jsonl", [Preference(id="a", prompt=PROMPT, **sides)])
    return tmp_path


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("--help", "inspect"),
        ("train --help", "--beta"),
        ("inspect config --set pair.min_gap=2", "min_gap"),
        ("inspect pairs --data . --limit 3 --side train", "chosen"),
        ("inspect completions a --data .", "spring tide"),
        ("judge --dry-run --data . --limit 1 --max-usd 3.5", "$"),
    ],
)
def test_a_command_loads_only_what_it_needs(folder, command, shown):
    done = subprocess.run([sys.executable, "-c", LOADED, *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output, _, loaded = done.stdout.rpartition("loaded:")
    assert shown in output
    assert HEAVY & set(loaded.split()) == set()


def parameters():
    """One option or argument of each kind and bound that any command has."""
    found = {}
    groups = [typer.main.get_command(cli.app)]
    while groups:
        group = groups.pop()
        groups += getattr(group, "commands", {}).values()
        for one in group.params:
            if one.callback is None:
                kind = one.type_descriptor.annotation
                found.setdefault((type(one).__mro__[-3], str(kind), getattr(one, "min", None), one.required), one)
    return list(found.values())


TYPED = [
    "1", "0", "-1", "007", "+1", "1.5", "-0.25", "1e3", "1_000", "nan", "inf", "9" * 18, "", " 1", "x", "none", "true",
    "False", "both", "BOTH", "data", "ü", "-", ".", "missing/file",
]  # fmt: skip


def test_what_is_typed_is_read_as_typer_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = typer.main.get_command(cli.app).make_context("nothing-dpo", ["demo"])
    kinds = parameters()
    assert len(kinds) > 12
    ours = 0
    for one in kinds:
        if type(one) in (TyperOption, TyperArgument):
            continue  # the root's own
        base = TyperOption if isinstance(one, TyperOption) else TyperArgument
        several = one.type_descriptor.is_list
        for value in [None, one.default, *([text] if several else text for text in TYPED), *([["a", "b"]] * several)]:
            results = []
            for read in (type(one).process_value, base.process_value):
                try:
                    result = read(one, context, value)
                    results.append((type(result), result if result == result else "nan"))
                except Exception as error:
                    results.append((type(error), str(error)))
            assert results[0] == results[1], (one.name, value)
            ours += cli._read_plainly(one.type_descriptor.annotation, value) is not ...
    assert ours > 100


# Where each provider is asked; of several, one name.
URLS = {
    "openai": "https://api.openai.com/v1",
    "azure": "https://example.openai.azure.com/openai/v1",
    "anthropic": "https://api.anthropic.com/v1",
    "google": "https://generativelanguage.googleapis.com/v1beta/openai",
    "aws": "https://bedrock-runtime.us-east-1.amazonaws.com/",
    "openrouter": "https://openrouter.ai/api/v1",
    "deepseek": "https://api.deepseek.com/v1",
    "mistral": "https://api.mistral.ai/v1",
    "groq": "https://api.groq.com/openai/v1",
    "perplexity": "https://api.perplexity.ai",
}
NAMES = [
    "nobody-knows-this",
    "gpt-4o",
    "GPT-5.4-mini",
    "claude-3-5-sonnet-20241022",
    "gpt-5.2-20251211",
    "gemini-20259999",
]


def of_library(url, model, context):
    """What the library says of three kinds of tokens, a million each; None where it knows no such model."""
    kinds = ({"input_tokens": 1000}, {"input_tokens": 1000, "cache_read_tokens": 1000}, {"output_tokens": 1000})
    try:
        return tuple(
            1000 * float(calc_price(Tokens(**kind), model, provider_api_url=url, price_context=context).total_price)
            for kind in kinds
        )
    except LookupError:
        return None


@pytest.mark.parametrize("name", URLS)
def test_prices_are_the_librarys_own(name):
    assert price_table._read() is not None, "the installed genai-prices has code that KNOWN does not name"
    models = [model.id for provider in providers if provider.id == name for model in provider.models]
    assert models and any(re.match(one.api_pattern, URLS[name]) and one.id == name for one in providers)
    known = 0
    for model in models[:: 1 + len(models) // 60] + NAMES:
        for context in ({}, {"processing": "batch"}, {"service_tier": "flex"}):
            expected = of_library(URLS[name], model, context)
            assert price_table.look_up(URLS[name], model, context) == expected, (model, context)
            known += expected is not None
    assert known >= 3


def test_other_code_of_the_library_is_asked_and_not_restated(monkeypatch):
    known, newest = price_of(URLS["openai"], "gpt-5.4-mini"), table_date()
    monkeypatch.setitem(price_table.KNOWN, "types.py", 1)
    price_table._read.cache_clear()
    try:
        assert price_table._read() is None
        asked = price_table.look_up(URLS["openai"], "gpt-5.4-mini", {})
        assert asked == (known.input, known.cached, known.output)
        assert table_date() == newest
    finally:
        price_table._read.cache_clear()
