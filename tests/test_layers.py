"""Imports go down only: the rules between the layers, read from the sources themselves."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import those of its own layer and of the layers above it in this list;
# "" is the package itself.
LAYERS = (
    {"estimate"},
    {"control"},
    {"capture", "distributed", "loop_checks", "parallel", "random_draws", "suspicions"},
    {"adaptation", "agreement", "clock", "deciding", "observers", "readings", "told", "words"},
    {"optim", "schedulers", "monitor"},
    {"", "__main__", "cli", "demo", "integrations", "plan", "record", "report", "watch"},
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PURE = LAYERS[0] | LAYERS[1]
IMPURE_STANDARD_MODULES = {"datetime", "random", "secrets", "time"}
LATE_INTEGRATIONS = {"cli", "demo"}  # these may import integrations inside a function

COLLECTIVES = {
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
    *("all_gather_tensor", "all_to_all", "all_to_all_single", "gather", "gather_object"),
    *("broadcast", "broadcast_object_list", "scatter", "scatter_object_list", "permute_tensor"),
    *("send", "recv", "isend", "irecv", "send_object_list", "recv_object_list"),
    *("batch_isend_irecv", "barrier", "monitored_barrier"),
}
GROUP_METHODS = {"allreduce", "allreduce_coalesced", "allgather", "allgather_into_tensor_coalesced"}
TENSOR_METHODS = {
    "redistribute",
    "full_tensor",
}  # of DTensors, which call collectives by themselves
MAY_REDISTRIBUTE = "noiseopt.capture.sharding"


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, str, bool, int]]:
    """Yield (local name, imported dotted name, inside a function?, line) for every import."""
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                yield local, alias.name, id(node) in late, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (
                    alias.asname or alias.name,
                    f"{source}.{alias.name}",
                    id(node) in late,
                    node.lineno,
                )


def component(dotted: str) -> str:
    """Return the part of the package that a dotted name belongs to, "" for the package itself."""
    names = dotted.split(".")
    return names[1] if len(names) > 1 and names[1] in RANKS else ""


def collectives(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) for every mention of a collective of torch.distributed."""
    aliases = {}
    for local, dotted, _, line in imports(tree, module):
        # `import a.b` binds a, every other import binds the whole of what it names
        aliases[local] = local if dotted.startswith(f"{local}.") else dotted
        if dotted.startswith("torch.distributed") and dotted.rpartition(".")[2] in COLLECTIVES:
            yield dotted, line
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
            inner = node.value
            while isinstance(inner, ast.Attribute):
                names.append(inner.attr)
                inner = inner.value
            base = aliases.get(inner.id, inner.id) if isinstance(inner, ast.Name) else ""
            dotted = ".".join([base, *reversed(names)])
            of_torch = dotted.startswith("torch.distributed") and node.attr in COLLECTIVES
            of_tensor = node.attr in TENSOR_METHODS and module != MAY_REDISTRIBUTE
            if of_torch or of_tensor or node.attr in GROUP_METHODS:
                yield dotted, node.lineno


def violations(source: str, module: str) -> list[str]:
    """Return what a module of this dotted name breaks; a package's ends in `.__init__`."""
    tree = ast.parse(source)
    here = component(module)
    if here == "" and module != "noiseopt.__init__":
        return [f"{module}: give it a layer in LAYERS"]
    found = []
    for _, dotted, is_late, line in imports(tree, module):
        place = f"{module}:{line}"
        top = dotted.partition(".")[0]
        if top == "integrations":
            found.append(f"{place}: integrations is imported as noiseopt.integrations")
        elif top == "noiseopt":
            there = component(dotted)
            if there == "integrations" != here:
                if not (is_late and here in LATE_INTEGRATIONS):
                    found.append(f"{place}: only cli and demo import {dotted}, and late")
            elif RANKS[there] > RANKS[here]:
                found.append(f"{place}: {here} imports {dotted}, which lies above it")
        elif here in PURE and (
            top not in sys.stdlib_module_names or top in IMPURE_STANDARD_MODULES
        ):
            found.append(f"{place}: {here} is pure and imports {dotted}")
    if here != "distributed":
        found += [
            f"{module}:{line}: {name} belongs into distributed"
            for name, line in collectives(tree, module)
        ]
    return found


def sources() -> dict[str, str]:
    """Return the text of every module by its dotted name."""
    paths = [*(ROOT / "noiseopt").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    found = {}
    for path in paths:
        names = path.relative_to(ROOT).with_suffix("").parts
        names = names if names[0] == "noiseopt" else ("noiseopt", *names)
        found[".".join(names)] = path.read_text(encoding="utf-8")
    return found


def test_the_package_keeps_its_layers():
    modules = sources()
    assert {"noiseopt.__init__", "noiseopt.integrations.__init__"} <= modules.keys()
    assert [broken for name, text in modules.items() for broken in violations(text, name)] == []


def test_modules_of_one_layer_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for name, text in sources().items():
        here = component(name)
        there = {
            component(dotted)
            for _, dotted, _, _ in imports(ast.parse(text), name)
            if dotted.partition(".")[0] == "noiseopt"
        }
        if here:
            graph.setdefault(here, set()).update(there - {here, ""})
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("noiseopt.estimate.window", "import torch", "is pure"),
        ("noiseopt.estimate.window", "import numpy as np", "is pure"),
        ("noiseopt.control.state", "def now():\n    import time", "is pure"),
        ("noiseopt.control.state", "from random import gauss", "is pure"),
        ("noiseopt.estimate", "from noiseopt.control import Controller", "lies above"),
        ("noiseopt.estimate.window", "from ..control.state import State", "lies above"),
        ("noiseopt.estimate.window", "from noiseopt import control", "lies above"),
        ("noiseopt.control.state", "from noiseopt import NoiseAwareAdamW", "lies above"),
        ("noiseopt.control.state", "import noiseopt.optim.base", "lies above"),
        ("noiseopt.capture", "from noiseopt import adaptation", "lies above"),
        ("noiseopt.adaptation", "from noiseopt.optim import NoiseAware", "lies above"),
        ("noiseopt.optim.base", "from noiseopt.cli import main", "lies above"),
        ("noiseopt.optim.base", "def f():\n    import noiseopt.integrations.wandb", "late"),
        ("noiseopt.cli", "from noiseopt.integrations import wandb", "late"),
        ("noiseopt.__init__", "from . import integrations", "late"),
        ("noiseopt.cli", "def f():\n    from integrations import wandb", "noiseopt.integrations"),
        ("noiseopt.capture", "import torch\ntorch.distributed.all_reduce(x)", "into distributed"),
        ("noiseopt.capture", "import torch.distributed as d\nd.broadcast(x)", "into distributed"),
        ("noiseopt.optim", "from torch import distributed as d\nd.barrier()", "into distributed"),
        ("noiseopt.optim", "from torch.distributed import all_gather as f", "into distributed"),
        ("noiseopt.optim", "group.allreduce([x]).wait()", "into distributed"),
        ("noiseopt.capture.norms", "grad.redistribute(placements=p)", "into distributed"),
        ("noiseopt.capture.sharding", "grad.device_mesh.allreduce([x])", "into distributed"),
        ("noiseopt.integrations.deepspeed", "import torch.distributed as d\nd.send(x, 1)", "into"),
        ("noiseopt.newcomer", "", "give it a layer"),
    ],
)
def test_the_checker_finds(module, source, reason):
    (found,) = violations(source, module)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("noiseopt.estimate.window", "import math\nfrom dataclasses import dataclass"),
        ("noiseopt.estimate.average", "from .window import Norms"),
        ("noiseopt.control.state", "from noiseopt.estimate import NoiseEstimate"),
        ("noiseopt.optim.base", "import torch\nfrom noiseopt import distributed, control"),
        ("noiseopt.optim.base", "import torch.distributed as d\nd.get_world_size()"),
        ("noiseopt.distributed", "import torch.distributed as d\nd.all_reduce(x)"),
        ("noiseopt.capture.sharding", "grad.redistribute(placements=p)"),
        ("noiseopt.cli", "def f():\n    from noiseopt.integrations import wandb"),
        ("noiseopt.integrations.wandb", "import wandb\nfrom noiseopt import NoiseAwareAdamW"),
        ("noiseopt.optim.base", "from functools import reduce\nsock.send(x); x.gather(0, i)"),
    ],
)
def test_the_checker_allows(module, source):
    assert violations(source, module) == []


def test_importing_the_package_tries_no_framework():
    heavy = {"accelerate", "deepspeed", "lightning", "matplotlib", "rich", "transformers", "wandb"}
    program = f"""
import sys
import torch

class Watch:
    tried = set()

    def find_spec(self, name, path=None, target=None):
        self.tried.add(name)

sys.meta_path.insert(0, Watch())
import noiseopt
print(*sorted(Watch.tried & {heavy}))
assert "noiseopt" in Watch.tried
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
