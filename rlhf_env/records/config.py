"""Settings: nested frozen dataclasses from YAML files and dotted overrides, every mistake named by key and place."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf_env.errors import ConfigError

T = TypeVar("T")


class Typed(str):
    """A value typed on a command line: it becomes what the type of its setting says, or else what YAML reads in it."""


@dataclass(frozen=True)
class Layer:
    """Some settings, nested as in YAML, and where they come from."""

    source: str
    values: Mapping[str, Any]


def build(cls: type[T], *layers: Layer, prefix: str = "") -> T:
    """An instance of the dataclass `cls` from `layers`, of which later ones override earlier ones key by key.

    A setting takes the type of its annotation: "1e-4" becomes a number where one is wanted. An unknown key, a wrong
    type or a missing setting raises `ConfigError` naming the layer's source and the dotted key after `prefix`.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, _checked(cls, layer.values, prefix, layer.source, _keys(cls, prefix)))
    return _construct(cls, merged, prefix)


def read_layer(path: str | Path) -> Layer:
    """The settings in a YAML file; 1e-4 is a number in it, and a key that occurs twice is an error."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: a mapping of settings was expected, this is {_kind(values)}")
    return Layer(str(path), values or {})


def dotted_layer(source: str, values: Iterable[tuple[str, Any]]) -> Layer:
    """The settings given as pairs of a dotted key and a value; of two for the same key the later one counts."""
    nested: dict[str, Any] = {}
    for key, value in values:
        for name in reversed(key.split(".")):
            value = {name: value}
        nested = _merge(nested, value)
    return Layer(source, nested)


def override_layer(overrides: Iterable[str]) -> Layer:
    """The settings in texts such as "env.beta=0.1"; of two for the same key the later one counts."""
    pairs = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override!r} is no override: write KEY=VALUE, for example env.beta=0.1")
        pairs.append((key, Typed(value)))
    return dotted_layer("the command line", pairs)


def to_dict(config: Any) -> dict[str, Any]:
    """The settings of a dataclass as plain YAML data, from which `build` makes an equal one."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(config)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping by dotted key."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def documented(cls: Any, prefix: str = "") -> dict[str, str]:
    """The `#:` sentence of every setting of a dataclass by its dotted key, those of nested ones in their place."""
    sentences: dict[str, str] = {}
    for kind in reversed(cls.__mro__[:-1]):  # a config may extend another one
        sentences |= dict(re.findall(r"^    (\w+): .*?  #: (.+)$", inspect.getsource(kind), re.MULTILINE))
    found: dict[str, str] = {}
    for name, kind in get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(kind)
        found |= documented(kind, f"{prefix}{name}.") if nested else {f"{prefix}{name}": sentences.get(name, "")}
    return found


def _checked(cls: Any, values: Any, prefix: str, source: str, known: list[str]) -> dict[str, Any]:
    """The settings of one layer, which need not be complete, each of its own type."""
    if isinstance(values, Typed):
        values = _parse(values, source)
    if values is None:  # a section of which everything is commented out
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {prefix.removesuffix('.')} must be a mapping of settings, it is {_kind(values)}")
    hints, checked = get_type_hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{source}: there is no setting {prefix}{name}{_suggestion(f'{prefix}{name}', known)}")
        if dataclasses.is_dataclass(hints[name]):
            checked[name] = _checked(hints[name], value, f"{prefix}{name}.", source, known)
        else:
            checked[name] = _coerce(value, hints[name], f"{prefix}{name}", source)
    return checked


def _construct(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    hints, arguments = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if dataclasses.is_dataclass(kind := hints[field.name]):
            if field.name in values or not has_default:
                arguments[field.name] = _construct(kind, values.get(field.name, {}), f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.name in values:
            arguments[field.name] = values[field.name]
        elif not has_default:
            raise ConfigError(f"the setting {prefix}{field.name} is missing, and it has no default")
    return cls(**arguments)


def _coerce(value: Any, kind: Any, key: str, source: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    wrong = f"{source}: {key} must be {_name(kind)}, it is {_kind(value)}"
    if dataclasses.is_dataclass(kind):  # one of a list
        checked = _checked(kind, value, f"{key}.", source, _keys(kind, f"{key}."))
        return _construct(kind, checked, f"{key}.")  # type: ignore[arg-type]
    if kind is Any:
        return _parse(value, f"{source}: {key}") if isinstance(value, Typed) else value
    if origin in (Union, UnionType):
        if NoneType in args and (value is None or isinstance(value, Typed) and value.lower() in ("none", "null", "")):
            return None
        for member in args:
            try:
                return _coerce(value, member, key, source)
            except ConfigError:
                continue
        raise ConfigError(wrong)
    if origin is Literal:
        if matches := [
            choice for choice in args if value == choice or isinstance(value, Typed) and value == str(choice)
        ]:
            return matches[0]
        raise ConfigError(f"{wrong}{_suggestion(str(value), [str(choice) for choice in args])}")
    if origin in (tuple, dict) or kind in (tuple, dict):
        value = _parse(value, f"{source}: {key}") if isinstance(value, Typed) else value
        return _collection(value, origin or kind, args, key, source, wrong)
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if kind in (int, float) and (number := _number(value, kind)) is not None:
        return number
    raise ConfigError(wrong)


def _collection(value: Any, kind: type, args: tuple[Any, ...], key: str, source: str, wrong: str) -> Any:
    if kind is dict:
        value = {} if value is None else value  # a section of which everything is commented out
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ConfigError(wrong)
        item = args[1] if args else Any
        return {name: _dict_item(each, item, f"{key}.{name}", source) for name, each in value.items()}
    if not isinstance(value, list | tuple):
        raise ConfigError(wrong)
    kinds = (Any,) * len(value) if not args else (args[0],) * len(value) if args[-1] is Ellipsis else args
    if len(kinds) != len(value):
        raise ConfigError(f"{wrong} of {len(value)}")
    return tuple(_coerce(each, k, f"{key}[{i}]", source) for i, (each, k) in enumerate(zip(value, kinds, strict=True)))


def _dict_item(value: Any, kind: Any, key: str, source: str) -> Any:
    if kind is Any and isinstance(value, Mapping):  # overrides may reach any depth
        return {name: _dict_item(each, Any, f"{key}.{name}", source) for name, each in value.items()}
    return _coerce(value, kind, key, source)


def _number(value: Any, kind: type) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if kind is int and not isinstance(value, float):
            try:
                return int(value)
            except ValueError:  # such as "2e5"
                pass
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return None
    return kind(number)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _keys(cls: Any, prefix: str) -> list[str]:
    """Every dotted key that `cls` knows."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys += _keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [f"{prefix}{name}"]
    return keys


def _suggestion(key: str, known: list[str]) -> str:
    """What was probably meant: the same name in another section, or a similar one, this section's first."""
    section, _, name = key.rpartition(".")
    known = list(dict.fromkeys([*known, *(parent for k in known if (parent := k.rpartition(".")[0]))]))
    here = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    same_name = [anywhere[name]] if name in anywhere else []
    close = [names[k] for names in (here, anywhere) for k in get_close_matches(name, names, n=1)]
    if best := [*same_name, *close]:
        return f"; did you mean {best[0]}?"
    return f"; there are {', '.join(here.values() or known)}"


_KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number", NoneType: "none"}


def _name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_name(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if tuple in (origin, kind):
        return "a list" if not args or args[-1] is Ellipsis else f"a list of {len(args)}"
    return "a mapping" if dict in (origin, kind) else _KINDS.get(kind, str(kind))


def _kind(value: Any) -> str:
    shown = repr(str(value) if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in version 1.2, and no key may occur twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := next((key for i, (key, _) in enumerate(node.value) if key.value in names[:i]), None):
            raise yaml.constructor.ConstructorError(
                problem=f"{twice.value!r} occurs twice", problem_mark=twice.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not isinstance(text, Typed) else ""
        raise ConfigError(f"{source}{line}: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, nesting without end
        raise ConfigError(f"{source}: {error}") from error
