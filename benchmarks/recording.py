"""Results in files, each with where it comes from: command, commit, device and versions."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def commit(*code: str) -> str:
    """The commit, marked where this code was changed since; "unknown" outside of a checkout.

    It is that of the first call: later ones would tell of code that this process has not loaded.

    Args:
        code: files and folders, from the repository's root.
    """

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ("git", *words), cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip()

    head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", *code)
    return f"{head}+changes" if changed and head != "unknown" else head


def origin_of(
    script: str, arguments: Sequence[str], code: Sequence[str] = ("noiseopt",), versions: str = ""
) -> dict[str, str]:
    """The command, the commit and the versions.

    Args:
        script: the benchmark's file, in this folder.
        arguments: what it was called with.
        code: what is measured, from the repository's root.
        versions: those of further libraries.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "command": " ".join((f"python benchmarks/{script}", *arguments)),
        "commit": commit(f"benchmarks/{script}", *code),
        "versions": f"python {python}, torch {torch.__version__}{versions and f', {versions}'}",
    }


def append(results: Iterable[Any], origin: dict[str, str], path: Path) -> None:
    """Add results, which are dataclasses, to a file as records, one to a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text()) if path.exists() else []
    records += [asdict(result) | origin for result in results]
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n")
