"""Packages that are imported when they are used: until then something small stands in their place."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """Stands in :data:`sys.modules` for a module that is not needed yet. The first time that something of it is asked
    for which is not ``known``, or one of its submodules is, the module itself takes the place.

    Args:
        name: with all packages above it imported, or standing in.
    """

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        vars(self).update(known, __path__=[])
        sys.modules[name] = self
        if not any(isinstance(item, _Submodules) for item in sys.meta_path):
            sys.meta_path.insert(0, _Submodules())

    @property
    def stands_in(self) -> bool:
        """The module itself has not been imported."""
        return sys.modules.get(self.__name__) is self

    def load(self) -> Any:
        """The module itself."""
        if self.stands_in:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # Any module is asked for these, by those who look through all of them.
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self.load(), name)


class _Submodules(MetaPathFinder):
    """Has a package imported before its submodules are looked for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, Later):
            return None
        package.load()
        there = sys.modules.get(name)
        return find_spec(name) if there is None else ModuleSpec(name, _There(there))


class _There(Loader):
    """Of a submodule that its package has imported: it stays what it is."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class Compiler(Later):
    """Stands in for torch's compiler, which many a function is decorated by that nobody compiles. Once it is there, it
    is told what it has missed.

    Args:
        importing: a context manager to import it in.
    """

    def __init__(self, importing: Callable[[], Any]) -> None:
        super().__init__("torch._dynamo")
        vars(self).update(_importing=importing, _missed=[])

    def load(self) -> Any:
        if not self.stands_in:
            return super().load()
        with self._importing():
            compiler = super().load()
        for tell in self._missed:
            tell(compiler)
        return compiler

    def disable(self, function: Any = None, recursive: bool = True, **named: Any) -> Any:
        """A function that is not to be compiled, or the decorator of such functions."""
        if not self.stands_in:
            return self.load().disable(function, recursive, **named)
        if function is None:
            return functools.partial(self.disable, recursive=recursive, **named)
        called = function

        def tell(compiler: Any) -> None:
            nonlocal called
            called = compiler.disable(function, recursive, **named)

        self._missed.append(tell)

        @functools.wraps(function)
        def disabled(*arguments: Any, **options: Any) -> Any:
            return called(*arguments, **options)

        return disabled

    def allow_in_graph(self, function: Any) -> Any:
        """A function that is compiled without a look inside."""
        if not self.stands_in:
            return self.load().allow_in_graph(function)
        self._missed.append(lambda compiler: compiler.allow_in_graph(function))
        return function
