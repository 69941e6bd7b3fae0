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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from shmx import _core
from shmx.array import SharedArray

__all__ = ["Graph", "Kinds", "register_container"]

_T = TypeVar("_T")


# ---- containers
#
# One that can be changed is changed in place. One that cannot is made anew: from its values, or, so that it may be part
# of a cycle, as a copy that is changed afterwards.


class _InPlace:
    """A container that can be changed."""

    def values(self, obj: Any) -> Iterable[Any]:
        """What it contains."""
        raise NotImplementedError

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        """The same, each with what `put` needs to find its place."""
        raise NotImplementedError

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        """Put `new` in the place of `old`."""
        raise NotImplementedError

    def replace(self, obj: Any, new: dict[int, Any], done: list[_Done]) -> None:
        """Put what `new` has, by id, in the places of what is there now; note each in `done`."""
        for key, value in list(self.items(obj)):
            if id(value) in new:
                after = new[id(value)]
                self.put(obj, key, value, after)
                done.append((self, obj, key, value, after))


# What was put where, so that it can be undone.
_Done = tuple[_InPlace, Any, Any, Any, Any]


class _Mapping(_InPlace):
    """The values of a dict."""

    def values(self, obj: Any) -> Iterable[Any]:
        return dict.values(obj)

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        return dict.items(obj)

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        # Not through an override, which might convert the value or refuse it.
        dict.__setitem__(obj, key, new)


class _Attributes(_InPlace):
    """The attributes of an object that keeps them in a dict."""

    def values(self, obj: Any) -> Iterable[Any]:
        values: Iterable[Any] = obj.__dict__.values()
        return values

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        items: Iterable[tuple[Any, Any]] = obj.__dict__.items()
        return items

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        obj.__dict__[key] = new


def _elements(base: Any, obj: Any) -> Iterable[Any]:
    # A subclass may iterate over something else.
    elements: Iterable[Any] = obj if type(obj) is base else tuple(base.__iter__(obj))
    return elements


class _Sequence(_InPlace):
    """A list or a deque."""

    def __init__(self, base: Any) -> None:
        self._base = base

    def values(self, obj: Any) -> Iterable[Any]:
        return _elements(self._base, obj)

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        return enumerate(_elements(self._base, obj))

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        self._base.__setitem__(obj, key, new)


class _Set(_InPlace):
    def values(self, obj: Any) -> Iterable[Any]:
        return _elements(set, obj)

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        return ((None, value) for value in _elements(set, obj))

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        # First, for an array cannot be in a set.
        set.add(obj, new)
        set.remove(obj, old)


class _Slots(_InPlace):
    """Attributes that have places of their own in an object."""

    def __init__(self, members: Sequence[Any]) -> None:
        self._members = members

    def values(self, obj: Any) -> Iterable[Any]:
        return [value for _, value in self.items(obj)]

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        for member in self._members:
            try:
                yield member, member.__get__(obj)
            except AttributeError:
                continue  # never set

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        key.__set__(obj, new)


class _Struct(_InPlace):
    """The fields of a msgspec.Struct."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = fields
        self._set = sys.modules["msgspec"].structs.force_setattr

    def values(self, obj: Any) -> Iterable[Any]:
        return [getattr(obj, field, None) for field in self._fields]

    def items(self, obj: Any) -> Iterable[tuple[Any, Any]]:
        return zip(self._fields, self.values(obj), strict=True)

    def put(self, obj: Any, key: Any, old: Any, new: Any) -> None:
        self._set(obj, key, new)


class _Several(_InPlace):
    """An object that contains things in several ways: slots and a dict, or attributes of a kind of list."""

    def __init__(self, parts: Sequence[_InPlace]) -> None:
        self._parts = parts

    def values(self, obj: Any) -> Iterable[Any]:
        return [value for part in self._parts for value in part.values(obj)]

    def replace(self, obj: Any, new: dict[int, Any], done: list[_Done]) -> None:
        for part in self._parts:
            part.replace(obj, new, done)


class _Tuple:
    """A tuple, named or not."""

    def values(self, obj: Any) -> Iterable[Any]:
        return _elements(tuple, obj)

    def again(self, obj: Any, values: Iterable[Any], new: list[Any]) -> Any:
        cls = type(obj)
        if cls is tuple:
            return tuple(new)
        # What torch and the interpreter return as named tuples takes a sequence, and has no other way.
        made = cls(new) if hasattr(cls, "n_sequence_fields") else tuple.__new__(cls, new)
        if hasattr(made, "__dict__"):
            made.__dict__.update(obj.__dict__)
        return made


class _FrozenSet:
    def values(self, obj: Any) -> Iterable[Any]:
        return tuple(frozenset.__iter__(obj))

    def again(self, obj: Any, values: Iterable[Any], new: list[Any]) -> Any:
        return type(obj)(new)


class _Flattened(tuple[Any, ...]):
    """What a registered class is made of, and what it said about the rest."""

    context: Any


class _Registered:
    """A class whose user says how to take it apart and make it again."""

    def __init__(
        self, flatten: Callable[[Any], tuple[Sequence[Any], Any]], unflatten: Callable[[list[Any], Any], Any]
    ) -> None:
        self._flatten = flatten
        self._unflatten = unflatten

    def values(self, obj: Any) -> Iterable[Any]:
        values, context = self._flatten(obj)
        flattened = _Flattened(values)
        flattened.context = context
        return flattened

    def again(self, obj: Any, values: Any, new: list[Any]) -> Any:
        return self._unflatten(new, values.context)


class _Frozen:
    """An object whose attributes are not to be changed: a copy of it is."""

    def __init__(self, copy: Callable[[Any], Any], attributes: _InPlace) -> None:
        self.copy = copy
        self.attributes = attributes
        self.values = attributes.values


class _Leaf(_InPlace):
    """No container: what is looked for."""


_LEAF = _Leaf()
_Anew = _Tuple | _FrozenSet | _Registered
_Kind = _InPlace | _Anew | _Frozen | None


# ---- which class is what

_registered: dict[type, _Registered] = {}
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
    _registered[cls] = _Registered(flatten, unflatten)
    for table in _tables:
        table.forget()


_MAPPING, _ATTRIBUTES, _SET = _Mapping(), _Attributes(), _Set()
_TUPLE, _FROZENSET = _Tuple(), _FrozenSet()
_BUILT_IN: dict[type, _InPlace | _Anew] = {
    dict: _MAPPING,
    list: _Sequence(list),
    collections.deque: _Sequence(collections.deque),
    set: _SET,
    tuple: _TUPLE,
    frozenset: _FROZENSET,
}

# Looked up first, so that most values cost one look.
_ATOMS = frozenset(
    {int, float, bool, str, bytes, bytearray, complex, type(None), type, range, slice, memoryview, torch.Size}
    | {torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType}
)
_OPAQUE_BASES = (enum.Enum, _core.SharedTensor, _core.Arena, SharedArray)
# A class of a program may derive from these of the standard library and still be a record of its own.
_PLAIN_MODULES = {"abc", "typing", "collections", "collections.abc", "_collections_abc", "dataclasses", "types"}
_PLAIN_CLASSES = (*argparse.Namespace.__mro__, *_BUILT_IN)
_KNOWN_AT_MOST = 4096


class Kinds:
    """What each class is to a walk; `is_leaf` says which classes it looks for."""

    def __init__(self, is_leaf: Callable[[type], bool]) -> None:
        """Begin with the built-in containers; others are looked at when they are met."""
        self._is_leaf = is_leaf
        self.known: dict[type, _Kind] = {}
        self.empty: set[type] = set()
        self.forget()
        _tables.append(self)

    def forget(self) -> None:
        """Look at every class anew."""
        self.known.clear()
        self.known.update(_BUILT_IN)
        self.known.update(dict.fromkeys(_ATOMS))
        self.empty.clear()
        self.empty.update(_ATOMS)

    def learn(self, cls: type) -> _Kind:
        """Look at a class that is not known yet."""
        if len(self.known) >= _KNOWN_AT_MOST:
            self.forget()  # classes that a program makes by the thousand are not kept alive
        kind = _LEAF if self._is_leaf(cls) else _registered.get(cls) or _kind_of(cls)
        self.known[cls] = kind
        if kind is None:
            self.empty.add(cls)
        return kind


def _kind_of(cls: type) -> _Kind:
    if issubclass(cls, _OPAQUE_BASES):
        return None
    if issubclass(cls, tuple):
        return _TUPLE
    if issubclass(cls, frozenset):
        return _FROZENSET
    if not all(map(_is_plain, cls.__mro__)):
        return None
    parts = [part for base, part in _BUILT_IN.items() if issubclass(cls, base) and isinstance(part, _InPlace)]
    msgspec = sys.modules.get("msgspec")
    if msgspec is not None and issubclass(cls, msgspec.Struct):
        struct: Any = cls
        fields = _Struct(struct.__struct_fields__)
        return _Frozen(struct.__copy__, fields) if struct.__struct_config__.frozen else fields
    if members := _slot_members(cls):
        parts.append(_Slots(members))
    if cls.__dictoffset__ != 0:
        parts.append(_ATTRIBUTES)
    if not parts:
        return None
    whole = parts[0] if len(parts) == 1 else _Several(parts)
    return _Frozen(_copy_of_frozen, whole) if _is_frozen(cls) else whole


def _is_plain(base: type) -> bool:
    if base in _PLAIN_CLASSES or base.__module__ in _PLAIN_MODULES:
        return True
    root = str(base.__module__).partition(".")[0]
    return root not in ("torch", "numpy", "builtins") and root not in sys.stdlib_module_names


def _slot_members(cls: type) -> list[Any]:
    return [
        member
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    ]


def _is_frozen(cls: type) -> bool:
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is not None:
        return bool(parameters.frozen)
    config = getattr(cls, "model_config", None)
    if hasattr(cls, "__pydantic_core_schema__") and isinstance(config, dict):
        return bool(config.get("frozen"))
    return hasattr(cls, "__attrs_attrs__") and "frozen" in getattr(cls.__setattr__, "__name__", "")


# What attrs remembers of a frozen object; the copy has another one.
_ATTRS_HASH = "_attrs_cached_hash"


def _copy_of_frozen(obj: Any) -> Any:
    cls = type(obj)
    try:
        new = object.__new__(cls)
    except TypeError as error:
        raise TypeError(
            f"{cls.__qualname__} is frozen and cannot be copied ({error}); tell shmx.register_container how to make "
            "one, or leave its tensors out"
        ) from error
    for member in _slot_members(cls):
        try:
            member.__set__(new, None if member.__name__ == _ATTRS_HASH else member.__get__(obj))
        except AttributeError:
            continue
    if hasattr(obj, "__dict__"):
        new.__dict__.update(obj.__dict__)
        if _ATTRS_HASH in new.__dict__:
            new.__dict__[_ATTRS_HASH] = None
    return new


# ---- the walk


class _ToMakeAnew:
    """A container that cannot be changed, what was in it, and what contains it."""

    __slots__ = ("kind", "obj", "owners", "values")

    def __init__(self, kind: _Anew | _Frozen, obj: Any, values: Iterable[Any], owner: _Owner) -> None:
        self.kind = kind
        self.obj = obj
        self.values = values
        self.owners = [owner]


# What contains something; a container that can be changed is told by itself, and the caller by None.
_Owner = _ToMakeAnew | tuple[_InPlace, Any] | None


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
    without
        Containers that are not looked into.

    Attributes
    ----------
    leaves : list
        Each once, in the order in which they were met.
    """

    def __init__(
        self, root: Any, kinds: Kinds, wanted: Callable[[Any], bool] | None = None, without: Iterable[Any] = ()
    ) -> None:
        """Look at everything; change nothing."""
        self._root = root
        self.leaves: list[Any] = []
        # By id, which no other object gets while these are alive; leaves are kept by the list of them.
        self._owners: dict[int, list[_Owner]] = {}
        self._met: dict[int, _Owner] = dict.fromkeys(map(id, without))
        self._look(kinds, wanted)

    def _look(self, kinds: Kinds, wanted: Callable[[Any], bool] | None) -> None:
        known, has_nothing, met, owners = kinds.known, kinds.empty.issuperset, self._met, self._owners
        queue: list[tuple[_Owner, Iterable[Any]]] = [(None, (self._root,))]
        for owner, values in queue:
            # A copy, because it may be changed by others meanwhile.
            for value in tuple(values):
                try:
                    kind = known[type(value)]
                except KeyError:
                    kind = kinds.learn(type(value))
                if kind is None:
                    continue
                key = id(value)
                if kind is _LEAF:
                    if key in owners:
                        owners[key].append(owner)
                    elif wanted is None or wanted(value):
                        owners[key] = [owner]
                        self.leaves.append(value)
                    continue
                if key in met:
                    container = met[key]
                    if isinstance(container, _ToMakeAnew):
                        container.owners.append(owner)
                    continue
                inside = kind.values(value)
                # Most containers have nothing inside that matters: numbers, strings.
                if has_nothing(map(type, inside)):
                    continue
                container = (kind, value) if isinstance(kind, _InPlace) else _ToMakeAnew(kind, value, inside, owner)
                met[key] = container
                queue.append((container, inside))

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
        touched: dict[int, _Owner] = {}
        work = [owner for key in new for owner in self._owners.get(key, ())]
        # What is made anew changes what contains it, and so on upwards.
        while work:
            owner = work.pop()
            if id(owner) not in touched:
                touched[id(owner)] = owner
                if isinstance(owner, _ToMakeAnew):
                    work += owner.owners
        new = dict(new)
        done: list[_Done] = []
        try:
            self._make_anew([owner for owner in touched.values() if isinstance(owner, _ToMakeAnew)], new)
            for owner in touched.values():
                if isinstance(owner, tuple):
                    kind, obj = owner
                    kind.replace(obj, new, done)
        except BaseException:
            for kind, obj, place, before, after in reversed(done):
                kind.put(obj, place, after, before)
            raise
        return new.get(id(self._root), self._root)

    def _make_anew(self, containers: list[_ToMakeAnew], new: dict[int, Any]) -> None:
        """Make each from what is complete by then, for a set takes the hashes of what it is made from.

        Only a cycle is closed by a copy that is completed later.
        """
        waiting = {id(one.obj): one for one in containers}
        begun: dict[int, _ToMakeAnew] = {}
        # What is deeper inside was met by its leaves first, and has to be made first.
        stack = list(reversed(waiting.values()))
        while stack:
            node = stack[-1]
            key = id(node.obj)
            if key not in waiting:
                stack.pop()
                continue
            first = [waiting[id(one)] for one in node.values if id(one) in waiting and id(one) not in new]
            if not first:
                self._make(node, new)
                del waiting[key]
                begun.pop(key, None)
                stack.pop()
                continue
            begun[key] = node
            closing = next((one for one in first if id(one.obj) in begun), None)
            if closing is None:
                stack += first
            elif isinstance(closing.kind, _Frozen):
                new[id(closing.obj)] = closing.kind.copy(closing.obj)
            else:
                stack.append(_one_to_copy(begun, closing))
                while id(closing.obj) in begun:
                    begun.popitem()

    def _make(self, node: _ToMakeAnew, new: dict[int, Any]) -> None:
        key = id(node.obj)
        if isinstance(node.kind, _Frozen):
            if key not in new:
                new[key] = node.kind.copy(node.obj)
            node.kind.attributes.replace(new[key], new, [])
        else:
            values = [new.get(id(value), value) for value in node.values]
            new[key] = node.kind.again(node.obj, node.values, values)


def _one_to_copy(begun: dict[int, _ToMakeAnew], closing: _ToMakeAnew) -> _ToMakeAnew:
    """What the cycle that ends at `closing` can begin at: a copy of it stands for it until it is complete."""
    for one in reversed(begun.values()):
        if isinstance(one.kind, _Frozen):
            return one
        if one is closing:
            break
    raise TypeError(
        f"{type(closing.obj).__qualname__} contains itself and can only be made anew from its values; leave its "
        "tensors out"
    )
