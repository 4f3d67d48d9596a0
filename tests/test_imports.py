"""The pure parts stay pure: importing them brings along no torch, no numpy, nothing from outside."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

PROBE = """
import sys
before = set(sys.modules)
import {module}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
foreign = sorted(name for name in loaded if name not in sys.stdlib_module_names and name != "diptych")
print(",".join(foreign))
"""


def pure_modules() -> list[str]:
    names = ["diptych", "diptych.engine.scripted"]
    for package in ("diptych.core", "diptych.policy", "diptych.sim"):
        names.append(package)
        names += [module.name for module in pkgutil.iter_modules(import_module(package).__path__, package + ".")]
    return names


@pytest.mark.parametrize("module", pure_modules())
def test_importing_it_loads_only_the_standard_library(module: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip() == ""
