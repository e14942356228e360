"""One order in which the value of every setting is found.

Flag > `--set section.key=value` > environment > `nothing-dpo.toml` (`--config`, TOML or YAML) > preset > default.
Every default, description and bound is written once, in `settings.py`; flags and `inspect config` take theirs from it.
Secrets are no settings: they are read from the environment where they are used and enter no file, argument or log.
"""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from dpo_cli.config import resolve as configuration
from dpo_cli.config.presets import PRESETS
from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError

ENVIRONMENT = {
    "DATA_PATH": "generate.prompts",
    "DPO_DATA_PATH": "data",
    "ADAPTER_PATH": "model.adapter",
    "DPO_ADAPTER_PATH": "model.dpo_adapter",
    "BASE_MODEL": "model.base",
    "SERVE_URL": "generate.url",
    "SERVE_MODEL": "model.name",
    "SERVE_DPO_MODEL": "model.dpo_name",
    "OPENAI_BASE_URL": "judge.url",
    "JUDGE_MODEL": "judge.model",
}

DEFAULT_FILE = "nothing-dpo.toml"
DEFAULT_PRESET = "l4"


class Resolved(Struct):
    """A configuration and, for each dotted key, where its value came from."""

    config: Config
    sources: dict[str, str]


@cache
def fields() -> dict[str, Any]:
    """Dotted key -> annotated type of every setting, in the order in which they are documented."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Config, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, Struct):
            hints = get_type_hints(kind, include_extras=True)
            found |= {f"{name}.{key}": hints[key] for key in kind.__struct_fields__}
        else:
            found[name] = kind
    return found


def describe(key: str) -> str:
    """The one-line description of a setting."""
    kind = fields()[key]
    metas = [part for part in get_args(kind)[1:] if isinstance(part, Meta) and part.description]
    return str(metas[-1].description)


def plain_type(key: str) -> type[Any]:
    """The type of a setting as a flag takes it: `int`, `float`, `bool`, `str`, or a list where one may be given."""
    kind = get_args(fields()[key])[0]
    parts = {get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(kind) or [kind]}
    parts -= {type(None)}
    if list[str] in parts:
        return list[str]
    return parts.pop() if len(parts) == 1 and parts <= {bool, int, float} else str


def takes_none(key: str) -> bool:
    """Whether `none` unsets a setting: it has no value of that name."""
    kinds = get_args(get_args(fields()[key])[0])
    return type(None) in kinds and "none" not in [value for kind in kinds for value in get_args(kind)]


def choices(key: str) -> list[str]:
    """The values of a setting that has nothing but a few; empty for any other."""
    found = list(dict.fromkeys(_choices(fields()[key])))
    return [] if None in found else [str(value) for value in found]


def _choices(kind: Any) -> Iterator[str | None]:
    """Each value of a type; None: it has values that can't be listed."""
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif kind is bool:
        yield from ("true", "false")
    elif kind is type(None):
        yield "none"
    elif get_origin(kind) is Annotated:
        yield from _choices(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType, list):
        for part in get_args(kind):
            yield from _choices(part)
    else:
        yield None


def default(key: str) -> Any:
    """The default of a setting."""
    return get(Config(), key)


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, for config.json."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def resolve(
    flags: Mapping[str, Any] | None = None,
    sets: list[str] | None = None,
    file: Path | None = None,
    preset: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """Find every value, by the one order.

    Args:
        flags: dotted key -> value given as a flag; None values were not given.
        sets: `section.key=value` strings.
        file: configuration file; unset: nothing-dpo.toml, if there is one.
        preset: preset name, before the file's own `preset` key.
        environment: defaults to the process's.

    Raises:
        UserError: unknown key, preset or file, or a value that does not fit.
    """
    environment = os.environ if environment is None else environment
    file_name, from_file = _read_file(file)
    from_preset = from_file.pop("preset", None)
    preset = preset or from_preset or DEFAULT_PRESET
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'", hint=f"one of: {', '.join(PRESETS)}")
    layers = [
        (f"preset {preset}", PRESETS[preset]),
        (file_name, from_file),
        *((f"env {name}", {key: environment[name]}) for name, key in ENVIRONMENT.items() if environment.get(name)),
        ("--set", dict(map(_parse_set, sets or []))),
        ("flag", {key: value for key, value in (flags or {}).items() if value is not None}),
    ]
    known = fields()
    values: dict[str, Any] = {}
    sources = dict.fromkeys(known, "default")
    for source, layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise _unknown(key, source, known)
            values[key] = _convert(key, value, known[key], source)
            sources[key] = source
    return Resolved(_build(values), sources)


def _build(values: dict[str, Any]) -> Config:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return msgspec.convert(nested, Config)


def _convert(key: str, value: Any, kind: Any, source: str) -> Any:
    if isinstance(value, str) and value.lower() == "none" and takes_none(key):
        return None
    try:
        if isinstance(value, str) and get_origin(get_args(kind)[0]) is dict:
            return msgspec.json.decode(value, type=kind)
        return msgspec.convert(value, kind, strict=False)
    except msgspec.MsgspecError as error:
        reason, values = str(error), choices(key)
        if reason.startswith("Expected `array`, got `str`"):
            reason = f'a list is expected, such as ["{value}"]'
        elif values:
            reason = f"one of {', '.join(values)}" if value in ("", [], None) else _outside(value, values)
        raise UserError(f"{key} = {value!r} (from {source}): {reason}", hint=describe(key)) from None


def _outside(value: Any, values: list[str]) -> str:
    """Which of the values that were given there are not, and those that there are."""
    given = value if isinstance(value, list) else [value]
    odd = [repr(one) for one in given if one not in values]
    return f"{', '.join(odd) or repr(value)} is none of {', '.join(values)}"


def _unknown(key: str, source: str, known: Mapping[str, Any]) -> UserError:
    name = key.rpartition(".")[2]
    if name.lower().endswith(("api_key", "token", "secret", "password")):
        hint = "secrets come from the environment only: OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY"
        return UserError(f"'{key}' is not a setting", where=source, hint=hint)
    import difflib

    same = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    close = same or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'?" if close else "nothing-dpo inspect config lists them"
    return UserError(f"unknown setting '{key}'", where=source, hint=hint)


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: no '='", hint="--set section.key=value")
    if value and value[0] in "[{\"'":  # lists and quoted strings as in the file; the rest is converted by its type
        import tomllib

        try:
            return key.strip(), tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"--set {text}: {error}") from None
    return key.strip(), None if value == "none" else value


def _read_file(path: Path | None) -> tuple[str, dict[str, Any]]:
    """Name and dotted keys of the configuration file."""
    if path is None:
        path = Path(DEFAULT_FILE)
        if not path.exists():
            return DEFAULT_FILE, {}
    import tomllib

    try:
        text = path.read_text("utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                content = yaml.safe_load(text) or {}
            except yaml.YAMLError as error:
                raise UserError(" ".join(str(error).split()), where=str(path)) from None
        else:
            content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(str(getattr(error, "strerror", None) or error), where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("not a table of settings", where=str(path))
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return str(path), flat


class Setting(Struct):
    """One row of `inspect config`."""

    key: str
    value: Any
    source: str
    description: str


def settings(resolved: configuration.Resolved) -> list[Setting]:
    """Every setting with its value and where it came from."""
    return [
        Setting(key, configuration.get(resolved.config, key), source, configuration.describe(key))
        for key, source in resolved.sources.items()
    ]
