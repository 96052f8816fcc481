"""Configuration from schema, presets and command line, in this order of precedence."""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.help import MEGATRON_OPTIONS, describe_keys
from megatron_m1.config.schema import Config

__all__ = ["from_yaml", "known_keys", "load_config", "to_yaml"]

_OWN_OPTIONS = ("config", "help", "print_config")


def load_config(argv: list[str], *, base: Config | None = None) -> Config:
    """Config from `--config FILE` (any number, later files win) and `--section.key value` options (win over files).

    base: defaults in place of the schema's, e.g. the configuration of a checkpoint. `--help` and `--print_config`
    print and raise SystemExit(0). Raises ConfigError for an unknown key (naming the nearest), a missing file, a value
    of the wrong type.
    """
    files, options = _split_config_files(argv)
    for file in files:
        _check_file(file)
    for option in options:
        if option.startswith("--"):
            name = option[2:].split("=", 1)[0].removesuffix("+")
            if name not in known_keys() and name not in _OWN_OPTIONS:
                raise ConfigError(_unknown(f"--{name}", name, where="command line"))
    parser = _parser(base)
    if {"-h", "--help"} & {*options}:
        describe_keys(parser)
    ordered = [argument for file in files for argument in ("--config", file)] + options
    try:
        namespace = parser.parse_args([*ordered])
        sections = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ConfigError(_readable(str(error))) from None
    return Config(**{field.name: sections[field.name] for field in dataclasses.fields(Config)})


def from_yaml(path: str | Path) -> Config:
    """Config stored in one YAML file; keys it lacks take the schema's defaults. Raises ConfigError like load_config."""
    return load_config(["--config", str(path)])


def to_yaml(config: Config, path: str | Path | None = None) -> str:
    """YAML text of every key of `config`; `from_yaml` gives back an equal Config.

    path: also write the text there, by an atomic rename (the folder must exist).
    """
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)
    if path is not None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return text


def known_keys() -> dict[str, object]:
    """Every dotted key of the schema, sections (`model`) included, with its type."""
    return dict(_walk_schema(Config, ""))


def _walk_schema(section: type, prefix: str) -> Iterator[tuple[str, object]]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        yield key, hints[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _walk_schema(hints[field.name], f"{key}.")


def _parser(base: Config | None) -> ArgumentParser:
    parser = ArgumentParser(prog="python -m megatron_m1", exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the keys below; repeatable.")
    parser.add_class_arguments(Config, None)
    if base is not None:
        values = dataclasses.asdict(base)
        parser.set_defaults({f"{s}.{key}": value for s, keys in values.items() for key, value in keys.items()})
    return parser


def _split_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    files, options = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            file = next(arguments, None)
            if file is None:
                raise ConfigError("--config needs the path of a YAML file.")
            files.append(file)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            options.append(argument)
    return files, options


def _check_file(path: str) -> None:
    """Raises ConfigError if `path` is no readable YAML mapping of known keys."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"--config={path} cannot be read: {error.strerror}; name an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config={path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config={path} holds a {type(content).__name__}; it must be a mapping such as `model: ...`."
        )
    keys = known_keys()
    for key in _walk_mapping(content, ""):
        if key not in keys:
            raise ConfigError(_unknown(key, key, where=path))
    for section, value in content.items():
        if not isinstance(value, dict):
            shown = "null" if value is None else value
            raise ConfigError(f"{section}={shown} ({path}) must be a mapping of keys; correct or remove it.")


def _walk_mapping(content: dict, prefix: str) -> Iterator[str]:
    """Every dotted key, but those of mappings whose keys are names of the user's."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and typing.get_origin(known_keys().get(f"{prefix}{key}")) is not dict:
            yield from _walk_mapping(value, f"{prefix}{key}.")


def _unknown(shown: str, name: str, *, where: str) -> str:
    keys = list(known_keys())
    leaf = name.rsplit(".", 1)[-1].replace("-", "_")
    same_leaf = [key for key in keys if key.rsplit(".", 1)[-1] == leaf]
    if leaf in MEGATRON_OPTIONS:
        near = [MEGATRON_OPTIONS[leaf]]
    else:
        near = same_leaf or difflib.get_close_matches(name.replace("-", "_"), keys, n=1, cutoff=0.0)
    return f"{shown} ({where}) is not a known key; did you mean {' or '.join(near)}? --help lists all keys."


def _readable(message: str) -> str:
    """jsonargparse's message as `path=value must be TYPE.` where it names a key and a value."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if message.lower().startswith("unrecognized arguments"):
        return f"{' '.join(message.split())}; keys are given as --section.key VALUE, files as --config FILE."
    if key is None or value is None or key[1] not in known_keys():
        return " ".join(message.split())
    return f"{key[1]}={value[1].strip()} must be {_type_name(known_keys()[key[1]])}."


def _type_name(hint: object) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is list:
        return f"a list of {_type_name(arguments[0])}, e.g. [A,B]"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
