"""Looking into containers and putting other objects in the places of some: nested, shared, cyclic, of any depth.

Nothing here recurses, and nothing is imported for the sake of a class: attrs, msgspec and pydantic are known by what
their classes look like, if a program uses them.
"""

from __future__ import annotations

import argparse
import collections
import enum
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from shmx import _core
from shmx.array import SharedArray

__all__ = ["Graph", "Kinds", "register_container"]

_T = TypeVar("_T")
_NO_KEYS: tuple[Any, ...] = ()


# ---- containers
#
# A mutable one is a list of parts, each with keys, values, and a way to put a value under a key. One that cannot be
# changed is made anew: from its values, or, so that it can be part of a cycle, as a shell that is filled afterwards.


class _Mapping:
    """The values of a dict, and the attributes of an object that keeps them in one."""

    def target(self, obj: Any) -> Any:
        return obj

    def open(self, target: Any) -> tuple[Sequence[Any], list[Any]]:
        values = list(target.values())
        return list(target), values

    def put(self, target: Any, key: Any, old: Any, new: Any) -> None:
        # Not through an override, which might convert the value or refuse it.
        dict.__setitem__(target, key, new)


class _Attributes(_Mapping):
    def target(self, obj: Any) -> Any:
        return obj.__dict__


class _Sequence:
    """A list or a deque."""

    def target(self, obj: Any) -> Any:
        return obj

    def open(self, target: Any) -> tuple[Sequence[Any], list[Any]]:
        values = list(target)
        return range(len(values)), values

    def put(self, target: Any, key: int, old: Any, new: Any) -> None:
        # Another thread may have changed it meanwhile: what has moved is left where it is.
        if key < len(target) and target[key] is old:
            target[key] = new


class _Set:
    def target(self, obj: Any) -> Any:
        return obj

    def open(self, target: Any) -> tuple[Sequence[Any], list[Any]]:
        values = list(target)
        return values, values

    def put(self, target: Any, key: Any, old: Any, new: Any) -> None:
        target.remove(old)
        target.add(new)


class _Slots:
    """Attributes that have places of their own in an object."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = members

    def target(self, obj: Any) -> Any:
        return obj

    def open(self, target: Any) -> tuple[Sequence[Any], list[Any]]:
        keys, values = [], []
        for key, member in self._members.items():
            try:
                values.append(member.__get__(target))
            except AttributeError:
                continue  # never set
            keys.append(key)
        return keys, values

    def put(self, target: Any, key: str, old: Any, new: Any) -> None:
        self._members[key].__set__(target, new)


class _Struct:
    """The fields of a msgspec.Struct."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self._fields = fields
        self._set = sys.modules["msgspec"].structs.force_setattr

    def target(self, obj: Any) -> Any:
        return obj

    def open(self, target: Any) -> tuple[Sequence[Any], list[Any]]:
        return self._fields, [getattr(target, field, None) for field in self._fields]

    def put(self, target: Any, key: str, old: Any, new: Any) -> None:
        self._set(target, key, new)


_Part = _Mapping | _Sequence | _Set | _Slots | _Struct


class _Anew:
    """A container that is made anew from its values."""

    def __init__(
        self, flatten: Callable[[Any], tuple[Sequence[Any], Any]], unflatten: Callable[[Any, list[Any]], Any]
    ) -> None:
        self.flatten = flatten
        self.unflatten = unflatten


class _Frozen:
    """An object whose attributes are not to be changed: a copy of it is made, and filled."""

    def __init__(self, copy: Callable[[Any], Any], parts: tuple[_Part, ...]) -> None:
        self.copy = copy
        self.parts = parts


class _Leaf:
    pass


_LEAF = _Leaf()
_Kind = tuple[_Part, ...] | _Anew | _Frozen | _Leaf | None


# ---- which class is what

_registered: dict[type, _Anew] = {}
_tables: list[Kinds] = []


def register_container(
    cls: type[_T],
    flatten: Callable[[_T], tuple[Sequence[Any], Any]],
    unflatten: Callable[[list[Any], Any], _T],
) -> None:
    """Tell :func:`wrap` and :func:`unwrap` how to look into a class that they do not know, or know wrongly.

    Parameters
    ----------
    cls
        Exactly this class; its subclasses are looked at as before.
    flatten
        Called with an object, returns ``(values, context)``.
    unflatten
        Called with ``(values, context)``, as many values in the same order, returns a new object. Called only when one
        of them has been replaced. As in ``torch.utils._pytree``.

    Raises
    ------
    TypeError
        ``cls`` is not a class, or one of those that are built in.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_container takes a class, not {cls!r}")
    if cls in _BUILT_IN or cls in _ATOMS:
        raise TypeError(f"{cls.__name__} is built in; register a class of your own")
    _registered[cls] = _Anew(flatten, lambda context, values: unflatten(values, context))
    for table in _tables:
        table.forget()


def _tuple_again(old: Any, values: list[Any]) -> Any:
    cls = type(old)
    if cls is tuple:
        return tuple(values)
    # What torch and the interpreter return as named tuples takes a sequence, and has no other way.
    new = cls(values) if hasattr(cls, "n_sequence_fields") else tuple.__new__(cls, values)
    if hasattr(new, "__dict__"):
        new.__dict__.update(old.__dict__)
    return new


_MAPPING, _ATTRIBUTES, _SEQUENCE, _SET = _Mapping(), _Attributes(), _Sequence(), _Set()
_TUPLE = _Anew(lambda obj: (obj, obj), _tuple_again)
_FROZENSET = _Anew(lambda obj: (list(obj), type(obj)), lambda cls, values: cls(values))
_BUILT_IN: dict[type, _Part | _Anew] = {
    dict: _MAPPING,
    list: _SEQUENCE,
    collections.deque: _SEQUENCE,
    set: _SET,
    tuple: _TUPLE,
    frozenset: _FROZENSET,
}

# Looked up first, so that most values cost one look.
_ATOMS = frozenset(
    {int, float, bool, str, bytes, bytearray, complex, type(None), type, range, slice, memoryview, torch.Size}
    | {torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType}
)
_OPAQUE_BASES = (type, enum.Enum, BaseException, torch.nn.Module, _core.SharedTensor, _core.Arena, SharedArray)
# A class of a program may derive from these of the standard library and still be a record of its own.
_PLAIN_MODULES = {"abc", "typing", "collections", "collections.abc", "_collections_abc", "dataclasses", "types"}
_PLAIN_CLASSES = (object, argparse.Namespace, *_BUILT_IN)
_KNOWN_AT_MOST = 4096


class Kinds:
    """What each class is to a walk; `is_leaf` says which classes it looks for."""

    def __init__(self, is_leaf: Callable[[type], bool]) -> None:
        """Begin with the built-in containers; others are looked at when they are met."""
        self._is_leaf = is_leaf
        self.known: dict[type, _Kind] = {}
        self.forget()
        _tables.append(self)

    def forget(self) -> None:
        """Look at every class anew."""
        self.known.clear()
        self.known.update(dict.fromkeys(_ATOMS))
        self.known.update({cls: part if isinstance(part, _Anew) else (part,) for cls, part in _BUILT_IN.items()})

    def learn(self, cls: type) -> _Kind:
        """Look at a class that is not known yet."""
        if len(self.known) >= _KNOWN_AT_MOST:
            self.forget()  # classes that a program makes by the thousand are not kept alive
        kind = self.known[cls] = _LEAF if self._is_leaf(cls) else _registered.get(cls) or _kind_of(cls)
        return kind


def _kind_of(cls: type) -> _Kind:
    if issubclass(cls, _OPAQUE_BASES):
        return None
    if issubclass(cls, tuple):
        return _TUPLE
    if issubclass(cls, frozenset):
        return _FROZENSET
    if not all(_is_plain(base) for base in cls.__mro__):
        return None
    parts = [part for base, part in _BUILT_IN.items() if issubclass(cls, base) and not isinstance(part, _Anew)]
    msgspec = sys.modules.get("msgspec")
    if msgspec is not None and issubclass(cls, msgspec.Struct):
        parts.append(_Struct(cls.__struct_fields__))  # type: ignore[attr-defined]
        return _Frozen(lambda obj: obj.__copy__(), tuple(parts)) if cls.__struct_config__.frozen else tuple(parts)  # type: ignore[attr-defined]
    if members := _slot_members(cls):
        parts.append(_Slots(members))
    if cls.__dictoffset__ != 0:
        parts.append(_ATTRIBUTES)
    if not parts:
        return None
    return _Frozen(_copy_of_frozen, tuple(parts)) if _is_frozen(cls) else tuple(parts)


def _is_plain(base: type) -> bool:
    if base in _PLAIN_CLASSES or base.__module__ in _PLAIN_MODULES:
        return True
    root = base.__module__.partition(".")[0]
    return root not in ("torch", "numpy", "builtins") and root not in sys.stdlib_module_names


def _slot_members(cls: type) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__slots__" not in vars(base):
            continue
        for name, member in vars(base).items():
            # Those of a base come under other names if it has the same ones.
            if isinstance(member, types.MemberDescriptorType) and name != "__weakref__":
                members.setdefault(name if name not in members else f"{base.__qualname__}.{name}", member)
    return members


def _is_frozen(cls: type) -> bool:
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is not None:
        return bool(parameters.frozen)
    config = getattr(cls, "model_config", None)
    if hasattr(cls, "__pydantic_core_schema__") and isinstance(config, dict):
        return bool(config.get("frozen"))
    return hasattr(cls, "__attrs_attrs__") and "frozen" in getattr(cls.__setattr__, "__name__", "")


def _copy_of_frozen(obj: Any) -> Any:
    cls = type(obj)
    try:
        new = object.__new__(cls)
    except TypeError as error:
        raise TypeError(
            f"{cls.__qualname__} is frozen and cannot be copied ({error}); tell shmx.register_container how to make "
            "one, or leave its tensors out"
        ) from error
    for name, member in _slot_members(cls).items():
        try:
            member.__set__(new, None if name == "_attrs_cached_hash" else member.__get__(obj))
        except AttributeError:
            continue
    if hasattr(obj, "__dict__"):
        new.__dict__.update(obj.__dict__)
        if "_attrs_cached_hash" in new.__dict__:
            new.__dict__["_attrs_cached_hash"] = None
    return new


# ---- the walk


class _Node:
    """One container that was met: its parts as they were, and which other nodes contain it."""

    __slots__ = ("context", "kind", "obj", "owners", "parts")

    def __init__(self, obj: Any, kind: Any) -> None:
        self.obj = obj
        self.kind = kind
        self.context: Any = None
        self.parts: list[tuple[Any, Any, Sequence[Any], Sequence[Any]]] = []
        self.owners: list[_Node] = []


class Graph:
    """Everything that is reached from an object, and where the leaves are.

    Parameters
    ----------
    root
        Where to begin. A leaf is a graph, too.
    kinds
        What to look for.
    wanted
        Which of the leaves count; all of them if not given.

    Attributes
    ----------
    leaves : list
        Each once, in the order in which they were met.
    """

    def __init__(self, root: Any, kinds: Kinds, wanted: Callable[[Any], bool] | None = None) -> None:
        """Look at everything; change nothing."""
        self._root = root
        self.leaves: list[Any] = []
        # By id; the nodes and the list of leaves keep the objects alive.
        self._owners: dict[int, list[_Node]] = {}
        self._nodes: dict[int, _Node] = {}
        self._unwanted: list[Any] = []
        self._look(root, kinds, wanted)

    def _look(self, root: Any, kinds: Kinds, wanted: Callable[[Any], bool] | None) -> None:
        known, nodes, owners = kinds.known, self._nodes, self._owners
        refused: set[int] = set()
        top = _Node(None, ())
        top.parts.append((_SEQUENCE, None, _NO_KEYS, (root,)))
        stack = [top]
        while stack:
            node = stack.pop()
            if node is not top:
                _open(node)
            met: list[_Node] = []
            for _, _, _, values in node.parts:
                for value in values:
                    cls = type(value)
                    kind = known[cls] if cls in known else kinds.learn(cls)
                    if kind is None:
                        continue
                    key = id(value)
                    if kind is _LEAF:
                        if key in owners:
                            owners[key].append(node)
                        elif key not in refused:
                            if wanted is None or wanted(value):
                                owners[key] = [node]
                                self.leaves.append(value)
                            else:
                                refused.add(key)
                                self._unwanted.append(value)
                        continue
                    child = nodes.get(key)
                    if child is None:
                        child = nodes[key] = _Node(value, kind)
                        met.append(child)
                    if type(kind) is not tuple:
                        child.owners.append(node)
            stack.extend(reversed(met))

    def replaced(self, new: dict[int, Any]) -> Any:
        """Put other objects in the places of leaves.

        Parameters
        ----------
        new
            What to put, by the id of the leaf. Leaves that are not in it stay.

        Returns
        -------
        object
            The root, or what stands for it.

        Raises
        ------
        TypeError
            A container cannot be made anew. Then nothing has been changed.
        """
        if not new:
            return self._root
        touched: dict[int, _Node] = {}
        work = [node for key, nodes in self._owners.items() if key in new for node in nodes]
        # What is made anew changes what contains it, and so on upwards.
        while work:
            node = work.pop()
            if id(node) not in touched:
                touched[id(node)] = node
                work.extend(node.owners)
        new = dict(new)
        self._make_anew([node for node in touched.values() if type(node.kind) is not tuple], new)
        done: list[tuple[Any, Any, Any, Any, Any]] = []
        try:
            for node in touched.values():
                if type(node.kind) is tuple:
                    _put_all(node.parts, new, done)
        except BaseException:
            for part, target, key, before, after in reversed(done):
                part.put(target, key, after, before)
            raise
        return new.get(id(self._root), self._root)

    def _make_anew(self, nodes: list[_Node], new: dict[int, Any]) -> None:
        shells = [node for node in nodes if type(node.kind) is _Frozen]
        for node in shells:
            new[id(node.obj)] = node.kind.copy(node.obj)
        waiting = {id(node.obj): node for node in nodes if type(node.kind) is _Anew}
        begun: set[int] = set()
        stack = list(waiting.values())
        while stack:
            node = stack[-1]
            key = id(node.obj)
            if key in new:
                stack.pop()
                continue
            (_, _, _, values) = node.parts[0]
            first = [waiting[id(value)] for value in values if id(value) in waiting and id(value) not in new]
            if not first:
                new[key] = node.kind.unflatten(node.context, [new.get(id(value), value) for value in values])
                stack.pop()
            elif key in begun:
                raise TypeError(
                    f"{type(node.obj).__qualname__} contains itself and can only be made anew from its values; leave "
                    "its tensors out"
                )
            else:
                begun.add(key)
                stack.extend(first)
        for node in shells:
            shell = new[id(node.obj)]
            for part, _, keys, values in node.parts:
                target = part.target(shell)
                for key, value in zip(keys, values, strict=True):
                    if id(value) in new:
                        part.put(target, key, value, new[id(value)])


def _open(node: _Node) -> None:
    kind = node.kind
    if type(kind) is _Anew:
        values, node.context = kind.flatten(node.obj)
        node.parts.append((None, None, _NO_KEYS, values))
        return
    for part in kind if type(kind) is tuple else kind.parts:
        target = part.target(node.obj)
        node.parts.append((part, target, *part.open(target)))


def _put_all(parts: list[tuple[Any, Any, Sequence[Any], Sequence[Any]]], new: dict[int, Any], done: list[Any]) -> None:
    for part, target, keys, values in parts:
        for key, value in zip(keys, values, strict=True):
            if id(value) in new:
                after = new[id(value)]
                part.put(target, key, value, after)
                done.append((part, target, key, value, after))
