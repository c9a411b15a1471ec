"""The arms by name, and the settings that each name stands for.

`constant-4`, `seesaw`, `auto`, `auto-without-lr`; any of them with other settings as
`seesaw@alpha=1.2` or `auto@decay_noise_fraction=0.5,verify=False`, or with other settings of the
user's than the tuned ones, as `auto@beta1=0.8` or `constant-1@lr=0.003`.
"""

import ast
import hashlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import noiseopt
from benchmarks.convergence.rivals import RULES, Rule
from noiseopt import NoiseConfig

WINDOWS = (1, 2, 4, 8, 16)
CONSTANTS = tuple(f"constant-{window}" for window in WINDOWS)
RIVALS = tuple(name for name in RULES if name != "constant")
OF_THE_OPTIMIZER = ("lr", "beta1", "beta2")  # settings that every arm has, beside those of its rule
MAX_NORM = 1.0  # where all arms clip; ours may do so at a lower norm

# Ours with a part removed, or with one that is off by default.
ABLATIONS: dict[str, dict[str, Any]] = {
    "auto-without-lr": {"adapt_lr": False},
    "auto-without-beta1": {"adapt_beta1": False},
    "auto-without-growth-in-decay": {"grow_in_decay": False},
    "auto-with-beta2": {"adapt_beta2": True},
    "auto-with-weight-decay": {"adapt_weight_decay": True},
    "auto-with-verify": {"verify": True},
    "auto-without-clip": {"adapt_clip": False},
    "auto-without-probes": {"probe_interval": 0},
    "auto-without-shrink": {"shrink": False},
    "auto-without-growth-by-noise": {"grow_by_noise": False},
}
MAIN = (*CONSTANTS, *RIVALS, "auto")


def is_ours(arm: str) -> bool:
    """Whether it is trained by our optimizer."""
    return base(arm) == "auto" or base(arm) in ABLATIONS


def base(arm: str) -> str:
    """The name without its settings."""
    return arm.partition("@")[0]


def window_of(arm: str) -> int | None:
    """The window of a constant arm; None of any other."""
    name, _, number = base(arm).rpartition("-")
    return int(number) if name == "constant" and number.isdigit() else None


def settings(arm: str) -> dict[str, Any]:
    """The settings that an arm's name stands for: of `NoiseConfig`, its rule or AdamW.

    Raises:
        ValueError: there is no such arm or setting.
    """
    name, _, rest = arm.partition("@")
    found: dict[str, Any] = {}
    window = window_of(arm)
    if window:
        found = {"steps": window, "keep_half_life": True}
        known = {field.name for field in fields(Rule)}
    elif is_ours(arm):
        found = {"max_norm": MAX_NORM, **ABLATIONS.get(name, {})}
        known = {field.name for field in fields(NoiseConfig)}
    elif name in RIVALS:
        known = {field.name for field in fields(RULES[name])}
    else:
        raise ValueError(f"{arm!r} is no arm: {', '.join((*MAIN, *ABLATIONS))}")
    known.update(OF_THE_OPTIMIZER)
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise ValueError(f"{arm!r}: {key!r} is none of {', '.join(sorted(known))}")
        found[key] = _plain(value)
    return found


def _plain(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def rule(arm: str, options: dict[str, Any]) -> Rule:
    """A new rule for a rival or a constant."""
    return RULES["constant" if window_of(arm) else base(arm)](**options)


@cache
def our_code() -> str:
    """A digest of what our optimizer does: its code without comments and docstrings."""
    root = Path(noiseopt.__file__).parent
    digest = hashlib.sha256()
    parts = ("*.py", "capture/*.py", "control/*.py", "estimate/*.py", "optim/*.py")
    for path in sorted(path for part in parts for path in root.glob(part)):
        if path.name not in ("cli.py", "__main__.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list) and body and _is_docstring(body[0]):
                    node.body = body[1:]  # type: ignore[attr-defined]
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
