"""The record of a run: every decision with its evidence, one JSON object to a line.

The first line is a header that says what decided: the settings, the learning-rate rule, the number
of parameter groups. Every further line is a decision and the windows that it rests on, so that the
whole run can be decided again, and compared, from the file alone. The lines are strict JSON: floats
that are not finite are the strings "inf", "-inf" and "nan".
"""

import functools
import json
import math
import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import noiseopt
from noiseopt.control import RATE_RULES, Controller, Decision, NoiseConfig

SCHEMA = 1

T = TypeVar("T")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Header:
    """What decided.

    Attributes:
        schema: the version of this format.
        version: the version of noiseopt that wrote it.
        config: the settings.
        rule: the learning-rate rule, a name in `RATE_RULES`.
        num_groups: the optimizer's parameter groups.
    """

    schema: int
    version: str
    config: NoiseConfig
    rule: str
    num_groups: int


@dataclass(frozen=True, slots=True)
class Record:
    """A file of decisions, read.

    Attributes:
        header: what decided.
        decisions: all that were written whole, in their order.
        cut: whether the last line was cut short, as when a run is killed while it writes.
    """

    header: Header
    decisions: tuple[Decision, ...]
    cut: bool


class DecisionLog:
    """An observer that appends each decision to a new file, whole lines at a time.

    In a distributed run all ranks decide alike: let rank 0 write.

    Args:
        path: the file to make; its folder is made too.
        config: the optimizer's settings.
        rule: its learning-rate rule, a name in `RATE_RULES`.
        num_groups: its number of parameter groups.

    Raises:
        FileExistsError: the file exists; records are never overwritten.
        ValueError: there is no such rule.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "decisions.jsonl"
        >>> with DecisionLog(path, NoiseConfig(), rule="adam") as log:
        ...     log(Controller.create(NoiseConfig(), RATE_RULES["adam"]).decide(lr=1e-3)[1])
        >>> read(path).decisions[0].action
        'hold'
    """

    def __init__(self, path: PathLike, config: NoiseConfig, rule: str, num_groups: int = 1) -> None:
        if rule not in RATE_RULES:
            raise ValueError(f"rule is {rule!r}: it must be one of {tuple(RATE_RULES)}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self.path.open("x", encoding="ascii")
        except FileExistsError:
            raise FileExistsError(
                f"{self.path} exists and a record is never overwritten: give another path, and in "
                "a distributed run let only rank 0 write"
            ) from None
        header = Header(SCHEMA, noiseopt.__version__, config, rule, num_groups)
        self._write(_dump(_encode(header)))

    def __call__(self, decision: Decision) -> None:
        """Append a decision."""
        self._write(to_line(decision))

    def close(self) -> None:
        """Close the file; it can be read at any time, also before."""
        self._file.close()

    def __enter__(self) -> "DecisionLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def to_line(decision: Decision) -> str:
    """Write a decision as one line of strict JSON, without the line's end."""
    return _dump({"schema": SCHEMA, **_encode(decision)})


def from_line(line: str) -> Decision:
    """Read what `to_line` wrote, exactly.

    Raises:
        ValueError: the line is not JSON, is of another schema, or is no decision.
    """
    return _load(Decision, line)


def read(path: PathLike) -> Record:
    """Read a record, also one whose run goes on or was killed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no record, is of another schema, or is damaged before its last line.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    cut = lines.pop() != ""
    if not lines:
        raise ValueError(f"{path} has no header: it is not a record, or its run ended at once")
    header = _line(Header, lines[0], path, 1)
    decisions = [
        _line(Decision, line, path, index) for index, line in enumerate(lines[1:], start=2)
    ]
    return Record(header, tuple(decisions), cut)


def replay(path: PathLike) -> tuple[Decision, ...]:
    """Decide a recorded run again, from its windows and learning rates.

    What comes out equals `read(path).decisions` unless the rules have changed since.
    """
    record = read(path)
    header = record.header
    controller = Controller.create(header.config, RATE_RULES[header.rule], header.num_groups)
    decisions = []
    for recorded in record.decisions:
        if recorded.noise is not None and recorded.noise.unit == "samples":
            controller = controller.counting_samples()  # as set_samples() has it
        for window in recorded.windows:
            controller = controller.learn(window)
        controller, decision = controller.decide(recorded.lr, recorded.windows)
        decisions.append(decision)
    return tuple(decisions)


def _line(kind: type[T], line: str, path: PathLike, number: int) -> T:
    try:
        return _load(kind, line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False)


def _load(kind: type[T], line: str) -> T:
    values = json.loads(line)
    if not isinstance(values, dict) or "schema" not in values:
        raise ValueError(f"{line[:40]!r} does not say its schema: this is not a record of noiseopt")
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is {values['schema']!r}; this noiseopt reads {SCHEMA}")
    return cast("T", _decode(kind, values, kind.__name__))


def _encode(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _encode(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return value


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Give a JSON value the type that its field is annotated with."""
    kinds = get_args(kind)
    if type(None) in kinds:
        return None if value is None else _decode(kinds[0], value, name)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_decode(kinds[0], item, name) for item in value)
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, name)
    if kind is float and type(value) in (int, float, str):
        return float(value)
    if get_origin(kind) is tuple or type(value) is not kind:
        raise ValueError(f"{name} is {value!r}, not {kind}")
    return value


def _decode_fields(kind: Any, values: dict[str, Any], name: str) -> Any:
    hints = _hints(kind)
    missing = hints.keys() - values
    if missing:
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    return kind(**{item: _decode(hints[item], values[item], f"{name}.{item}") for item in hints})


_hints = functools.cache(get_type_hints)
