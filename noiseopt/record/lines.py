"""One line of a record: a start or a decision as strict JSON, and back without a loss."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import noiseopt
from noiseopt.control import (
    RATE_RULES,
    ControllerState,
    Decision,
    NoiseConfig,
    Rates,
    Start,
    Window,
    from_numbers,
    to_numbers,
)
from noiseopt.estimate import WindowNorms

SCHEMA = 2
KINDS = ("start", "decision")

# What records from before there were these fields stand for: left out where they hold it.
LATER: dict[type, dict[str, Any]] = {
    NoiseConfig: {
        "objective": "updates",
        "measure_interval": 1,
        "adapt_beta1": False,
        "update_price": 1.0,
    },
    Rates: {"beta1": 1.0},
    Decision: {"seconds": None, "costs": None},
}
RENAMED = {"grow_when_stable": "grow_by_noise"}  # settings, since those records
IN_ORDER = (Window, WindowNorms)  # written as lists, without names: they are most of a record


def to_line(item: Start | Decision, config_hash: str = "") -> str:
    """Write a start or a decision as one line, without the line's end.

    Args:
        item: what to write.
        config_hash: of the settings that decided; a start tells its own.
    """
    values: dict[str, Any] = {"schema": SCHEMA, "kind": "decision", "time": round(time.time(), 3)}
    if isinstance(item, Start):
        values |= {"kind": "start", "version": noiseopt.__version__}
        values |= {"config_hash": hash_of(item.config), "config": _encode(item.config)}
        values |= {"rule": item.rule, "groups": list(item.groups)}
        values["state"] = {name: _encode(value) for name, value in to_numbers(item.state).items()}
    else:
        values |= {"config_hash": config_hash, **_encode(item)}
    return json.dumps(values, allow_nan=False)


def from_line(line: str | bytes) -> tuple[Start | Decision, float]:
    """Read what `to_line` wrote: the start or decision, exactly, and when it was written.

    Raises:
        ValueError: the line is not JSON, is of another schema, or is neither.
    """
    values = parse(line)
    if values["kind"] == "start":
        return _start(values), float(values["time"])
    decision: Decision = _decode(Decision, values, "Decision")
    return decision, float(values["time"])


def parse(line: str | bytes) -> dict[str, Any]:
    """The line's JSON object, seen to be of this schema.

    Raises:
        ValueError: it is not.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or "schema" not in values:
        raise ValueError(f"{line[:40]!r} does not say its schema: this is not a record of noiseopt")
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is {values['schema']!r}; this noiseopt reads {SCHEMA}")
    if values.get("kind") not in KINDS:
        raise ValueError(f"its kind is {values.get('kind')!r}: it must be one of {KINDS}")
    if not isinstance(values.get("time"), int | float):
        raise ValueError(f"its time is {values.get('time')!r}, not a number of seconds")
    return values


def hash_of(config: NoiseConfig) -> str:
    """A short name for settings: the same for the same values."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


def _start(values: Mapping[str, Any]) -> Start:
    missing = {"config", "rule", "groups", "state"} - values.keys()
    if missing:
        raise ValueError(f"Start lacks {', '.join(sorted(missing))}")
    config: NoiseConfig = _decode(NoiseConfig, _renamed(values["config"]), "Start.config")
    if values["rule"] not in RATE_RULES:
        raise ValueError(f"rule is {values['rule']!r}: it must be one of {tuple(RATE_RULES)}")
    groups: tuple[str, ...] = _decode(tuple[str, ...], values["groups"], "Start.groups")
    if not isinstance(values["state"], dict):
        raise ValueError(f"Start.state is {values['state']!r}, not an object")
    numbers = {
        name: float(number) if isinstance(number, str) else number
        for name, number in values["state"].items()
    }
    state = from_numbers(ControllerState.initial(config, len(groups)), numbers)
    return Start(config, values["rule"], groups, state)


def _renamed(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def _encode(value: Any) -> Any:
    if isinstance(value, IN_ORDER):
        return [_encode(getattr(value, item.name)) for item in fields(value)]
    if is_dataclass(value):
        later = LATER.get(type(value), {})
        values = {item.name: getattr(value, item.name) for item in fields(value)}
        return {
            name: _encode(item)
            for name, item in values.items()
            if name not in later or item != later[name]
        }
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return value


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Give a JSON value the type that its field is annotated with."""
    try:
        return _decoder(kind)(value)
    except ValueError as error:
        raise ValueError(f"{name}{error}") from error


@functools.cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this type of a JSON value; its errors say the rest of the name."""
    kinds = get_args(kind)
    if type(None) in kinds:
        known = _decoder(kinds[0])
        return lambda value: None if value is None else known(value)
    if get_origin(kind) is tuple:
        return _tuple_decoder(kind, _decoder(kinds[0]))
    if is_dataclass(kind):
        return _fields_decoder(kind)
    return _decode_float if kind is float else _plain_decoder(kind)


def _tuple_decoder(kind: Any, item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if type(value) is not list:
            raise _not(kind, value)
        return tuple(map(item, value))

    return decode


def _fields_decoder(kind: Any) -> Callable[[Any], Any]:
    decoders = {name: _decoder(hint) for name, hint in get_type_hints(kind).items()}
    names, later = tuple(decoders), LATER.get(kind, {})

    def decode(value: Any) -> Any:
        if kind in IN_ORDER and type(value) is list:
            value = dict(zip(names, value, strict=False))
        if type(value) is not dict:
            raise _not(kind, value)
        missing = decoders.keys() - value.keys() - later.keys()
        if missing:
            raise ValueError(f" lacks {', '.join(sorted(missing))}")
        found, name = dict(later), ""
        try:
            for name, decoder in decoders.items():
                if name in value:
                    found[name] = decoder(value[name])
        except ValueError as error:
            raise ValueError(f".{name}{error}") from None
        return kind(**found)

    return decode


def _decode_float(value: Any) -> float:
    if type(value) not in (float, int, str):
        raise _not(float, value)
    try:
        return float(value)
    except ValueError:
        raise _not(float, value) from None


def _plain_decoder(kind: Any) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if type(value) is not kind:
            raise _not(kind, value)
        return value

    return decode


def _not(kind: Any, value: Any) -> ValueError:
    return ValueError(f" is {value!r}, not {kind}")
