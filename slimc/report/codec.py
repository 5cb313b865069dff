"""Frozen dataclasses to JSON-ready data and back, by their type annotations."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from slimc.errors import InternalError, LoadError


def encode(value: Any, where: str) -> Any:
    """Dataclasses become dictionaries and tuples become lists; `where` names the value in an error."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InternalError(f"{where} is {value}; a report holds finite numbers, and None for what was not measured")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InternalError(f"{where} is a {type(value).__name__}; a report holds numbers, text and dataclasses only")


def decode(kind: Any, data: Any, where: str) -> Any:
    """The value of type `kind` that `encode` turned into `data`; LoadError where `data` does not fit."""
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None:
            return _expect(type(None) in arguments, None, where, kind, data)
        (present,) = (argument for argument in arguments if argument is not type(None))
        return decode(present, data, where)
    if origin is tuple:
        return _decode_tuple(arguments, data, where)
    if origin is Mapping:
        _expect(isinstance(data, Mapping), None, where, "an object", data)
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    accepted = (int, float) if kind is float else kind
    fits = isinstance(data, accepted) and (kind is bool or not isinstance(data, bool))
    return _expect(fits, data, where, kind.__name__, data)


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, Mapping), None, where, "an object", data)
    hints = get_type_hints(kind)
    values = {}
    for item in fields(kind):
        if item.name in data:
            values[item.name] = decode(hints[item.name], data[item.name], f"{where}.{item.name}")
        elif item.default is MISSING:
            raise LoadError(f"{where}.{item.name} is missing; this is not a complete slimc report")
    return kind(**values)


def _decode_tuple(arguments: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, (list, tuple)), None, where, "a list", data)
    if arguments[-1] is Ellipsis:
        return tuple(decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    _expect(len(data) == len(arguments), None, where, f"a list of {len(arguments)}", data)
    return tuple(
        decode(argument, item, f"{where}[{index}]")
        for index, (argument, item) in enumerate(zip(arguments, data, strict=True))
    )


def _expect(fits: bool, value: Any, where: str, wanted: Any, seen: Any) -> Any:
    if not fits:
        raise LoadError(f"{where} is {seen!r:.80}; {wanted} is wanted")
    return value
