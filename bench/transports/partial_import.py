"""Imports single modules of a large package without its dependencies.

A serving engine imports everything it may ever need. Of such a package only the modules that are named run, unchanged,
from the installed files; every other module of it, and every module that is not installed, is answered by an empty
stand-in while the import lasts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["import_only"]


class _Nothing(type):
    """A class that can be subscripted, subclassed, called and used as a decorator, to no effect."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _nothing(cls.__name__)


def _nothing(name: str) -> Any:
    return _Nothing(name, (), {})


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _nothing(name)
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str, real: Sequence[str], values: Mapping[str, Mapping[str, Any]]) -> None:
        self.package = package
        self.real = real
        self.values = values
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        self.root = Path(next(iter(spec.submodule_search_locations)))

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name in self.real:
            return None
        # Elsewhere a module stays real if it can be found; the finder asks itself only once.
        if name.partition(".")[0] != self.package and _installed(name, self):
            return None
        spec = ModuleSpec(name, self, is_package=True)
        # The search path of a stand-in leads to the real modules below it.
        spec.submodule_search_locations = [str(self.root.joinpath(*name.split(".")[1:]))]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        for name, value in self.values.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _installed(name: str, finder: _Finder) -> bool:
    sys.meta_path.remove(finder)
    try:
        # The parent is imported already; it may be a stand-in, below which everything is one.
        parent = sys.modules.get(name.rpartition(".")[0])
        return not isinstance(parent, _StandIn) and importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.meta_path.insert(0, finder)


def import_only(
    package: str, modules: Sequence[str], values: Mapping[str, Mapping[str, Any]] | None = None
) -> list[ModuleType]:
    """Import some modules of a package.

    Parameters
    ----------
    package
        An installed package that was not imported before.
    modules
        Full names of the modules that run; they may import each other. All are returned.
    values
        What stand-ins offer where something empty will not do: module name, then attribute.

    Raises
    ------
    ModuleNotFoundError
        The package or one of the modules is not installed.
    """
    finder = _Finder(package, modules, values or {})
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        return [importlib.import_module(name) for name in modules]
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _StandIn) and name.partition(".")[0] != package:
                del sys.modules[name]
