"""Tables for a terminal: by rich where it is installed, as plain text elsewhere."""

import sys
from collections.abc import Sequence
from typing import TextIO


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output."""
    try:
        import rich.box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        plain(title, header, rows, sys.stdout)
        return
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE, show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(soft_wrap=False, highlight=False).print(table)


def plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    """Print a table in aligned columns.

    Example:
        >>> plain("Fruit", ("", "kg"), [("apples", "3"), ("figs", "12")], sys.stdout)
        Fruit
                kg
        apples  3
        figs    12
    """
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    stream.write(f"{title}\n")
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        stream.write("  ".join(cells).rstrip() + "\n")
