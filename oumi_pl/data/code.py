"""A hash of the user's code that makes examples, as part of a cache's key.

Two things decide what a function returns: the source of its module and of all that it imports, and the values that it
sees: globals, closures, defaults, attributes. A file determines most of these; a function that another one returned, a
notebook and an object with settings have values that no file shows.
"""

import ast
import contextlib
import dis
import functools
import hashlib
import inspect
import itertools
import os
import pickle
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

NAMELESS = (staticmethod, classmethod, functools.cached_property, property)
"""Descriptors of a class that hold functions."""


def code_of(*parts: Any) -> str:
    """Hash of classes, functions and objects: of their source, of all user code they use, and of the values they see.

    Libraries and this package are left out. Follows the bases of classes and the imports of each file, also those
    inside functions. In a notebook, all functions and methods count.
    """
    values = _Values()
    for part in parts:
        values.add(part)
    waiting = [*values.modules]
    sources: dict[str, bytes] = {}
    while waiting:
        name = waiting.pop()
        if name in sources or (source := _own_source(name)) is None:
            continue
        sources[name] = source
        waiting += _imported(name, source)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name] + b"\0")
    digest.update(b"".join(values.entries))
    return digest.hexdigest()


def settings_of(data: Any) -> str:
    """Hash of the attributes of a data module that the user's own methods read, besides those that its bases use.

    So a subclass's own argument, kept in an attribute of any name, is part of the key.
    """
    read: set[str] = set()
    ours: set[str] = set()
    for cls in type(data).__mro__:
        codes = [function.__code__ for function in _functions(vars(cls).values())]
        if is_own(cls.__module__):
            read.update(name for code in codes for name in _names(code, "LOAD_ATTR", "LOAD_METHOD"))
        else:
            ours.update(vars(cls), (name for code in codes for name in _names(code, "STORE_ATTR")))
    values = _Values()
    for name in sorted((read - ours) & vars(data).keys()):
        values.entries.append(name.encode() + b"\0")
        values.add(vars(data)[name])
    return hashlib.blake2b(b"".join(values.entries), digest_size=16).hexdigest()


def is_own(module: str) -> bool:
    """Whether a module is the user's: neither this package nor a library. A module without a file is the user's."""
    top = module.partition(".")[0]
    if top == "oumi_pl" or top in sys.stdlib_module_names:
        return False
    file = _located(module)[0]
    if file is None:
        return True
    path = Path(file)
    return path.suffix == ".py" and not {"site-packages", "dist-packages"} & set(path.parts)


class _Values:
    """Collects the user's functions and classes with the values that they see, as bytes, and their modules."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.modules: set[str] = set()
        self._seen: dict[int, tuple[int, Any]] = {}  # keeps the objects, so that no other one gets the same id

    def add(self, value: Any, *, in_file: bool = False) -> None:
        """Adds a value and all that it refers to.

        Args:
            value: Any object.
            in_file: Whether a source file shows how it is made, so that it may be left out if it is a library's.
        """
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            self.entries.append(f"{type(value).__name__} {value!r}\0".encode(errors="surrogatepass"))
            return
        if id(value) in self._seen:
            self.entries.append(f"again {self._seen[id(value)][0]}\0".encode())
            return
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, list | tuple | dict | set | frozenset):
            self._container(value, in_file)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._all([value.__func__, value.__self__], in_file)
        elif isinstance(value, functools.partial):
            self._all([value.func, value.args, value.keywords], in_file)
        elif isinstance(value, NAMELESS):
            self._all(_functions([value]), in_file)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, ModuleType):
            self.modules.add(value.__name__)
        elif is_own(type(value).__module__):
            self._class(type(value))
            self._container(getattr(value, "__dict__", {}), in_file)
        elif (wrapped := inspect.unwrap(value) if callable(value) else value) is not value:
            self.add(wrapped, in_file=in_file)
        elif not in_file:
            self._pickled(value)

    def _all(self, values: Iterable[Any], in_file: bool) -> None:
        for value in values:
            self.add(value, in_file=in_file)

    def _container(self, value: Any, in_file: bool) -> None:
        self.entries.append(f"{type(value).__name__} {len(value)}\0".encode())
        if isinstance(value, set | frozenset):  # their order differs from process to process
            self.entries.append(repr(sorted(map(repr, value))).encode(errors="surrogatepass"))
        else:
            self._all(itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value, in_file)

    def _function(self, function: FunctionType) -> None:
        if not is_own(function.__module__ or ""):
            return
        self.modules.add(function.__module__)
        self.entries.append(f"function {function.__qualname__}\0".encode())
        for code in _codes(function.__code__):
            self.entries.append(code.co_code)
            self._all((c for c in code.co_consts if not isinstance(c, CodeType)), in_file=True)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # its variable is not set yet
                self.add(cell.cell_contents)
        self._all([function.__defaults__, function.__kwdefaults__], in_file=False)
        in_file = _located(function.__module__)[0] is not None
        for name in sorted(set(_names(function.__code__, "LOAD_GLOBAL"))):
            if name in function.__globals__:
                self.add(function.__globals__[name], in_file=in_file)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not is_own(base.__module__) or (base is not cls and id(base) in self._seen):
                continue
            self._seen[id(base)] = len(self._seen), base
            self.modules.add(base.__module__)
            self.entries.append(f"class {base.__qualname__}\0".encode())
            for name, value in sorted(vars(base).items()):
                if not name.startswith("__") or isinstance(value, FunctionType):
                    self.add(value, in_file=True)

    def _pickled(self, value: Any) -> None:
        try:
            self.entries.append(pickle.dumps(value))
        except Exception:  # whatever an object raises that can't be pickled; it is then like no other
            self.entries.append(os.urandom(16))


def _functions(values: Iterable[Any]) -> Iterator[FunctionType]:
    """The functions among the values of a class, and those within properties, class methods and the like."""
    for value in values:
        held = (
            [value.fget, value.fset, value.fdel]
            if isinstance(value, property)
            else [getattr(value, "__func__", getattr(value, "func", None))]
            if isinstance(value, NAMELESS)
            else [value]
        )
        yield from (function for function in held if isinstance(function, FunctionType))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType, *instructions: str) -> Iterator[str]:
    """The names in these instructions of a function's bytecode."""
    for part in _codes(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in instructions:
                yield str(instruction.argval)


def _own_source(name: str) -> bytes | None:
    """The source of a user's module; None if it belongs to this package or a library, or has no source."""
    if not is_own(name):
        return None
    file = _located(name)[0]
    if file is None:
        return _typed_source() if name == "__main__" else None
    return Path(file).read_bytes()


def _located(name: str) -> tuple[str | None, Sequence[str] | None]:
    """The file of a module, and the folders of its submodules if it is a package. Imports nothing."""
    if (module := sys.modules.get(name)) is not None:
        return getattr(module, "__file__", None), getattr(module, "__path__", None)
    parent = name.rpartition(".")[0]
    folders = _located(parent)[1] if parent else None
    spec = PathFinder.find_spec(name, folders) if folders is not None or not parent else None
    return (None, None) if spec is None else (spec.origin, spec.submodule_search_locations)


def _imported(name: str, source: bytes) -> Iterator[str]:
    """Dotted names that a module imports, modules or not, and the packages that contain them."""
    file, folders = _located(name)
    package = name if folders is not None else name.rpartition(".")[0]
    names = []
    if file is None:  # a notebook: its import statements are not in a file
        values = vars(sys.modules[name]).values()
        names = [v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) or "" for v in values]
    with contextlib.suppress(SyntaxError, ImportError):  # an invalid file will fail when it is imported
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
                names += [f"{origin}.{alias.name}" for alias in node.names]
    for imported in names:
        yield from itertools.accumulate(imported.split("."), "{}.{}".format)


def _typed_source() -> bytes:
    """The source of a notebook's functions and methods; if unavailable, random bytes, which miss the cache."""
    own = [value for value in vars(sys.modules["__main__"]).values() if getattr(value, "__module__", "") == "__main__"]
    members = [member for value in own for member in (vars(value).values() if isinstance(value, type) else (value,))]
    try:
        sources = [textwrap.dedent(inspect.getsource(member)) for member in members if inspect.isfunction(member)]
    except OSError:
        return f"# {os.urandom(16).hex()}".encode()
    return "\n".join(sources).encode()
