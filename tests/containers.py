"""One example of every kind of container that requests are made of, each with places for two values."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import types
from abc import ABC
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import attrs
import msgspec
import pydantic

_T = TypeVar("_T")


class Named(NamedTuple):
    first: Any
    second: Any


class NamedWithAttributes(Named):
    pass


class Table(dict):
    """A dict that does not take just anything."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read the manual")


class Items(list):
    pass


@dataclasses.dataclass
class Data:
    first: Any
    second: Any
    rid: str = "r"


@dataclasses.dataclass(slots=True)
class DataSlots:
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class DataFrozen:
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True, slots=True)
class DataFrozenSlots:
    first: Any
    second: Any
    unset: Any = dataclasses.field(init=False)


@attrs.define
class Attrs:
    first: Any
    second: Any


@attrs.frozen(cache_hash=True, eq=False, unsafe_hash=True)
class AttrsFrozen:
    first: Any
    second: Any


@attrs.frozen(slots=False)
class AttrsFrozenDict:
    first: Any
    second: Any


class Struct(msgspec.Struct):
    first: Any
    second: Any


class StructFrozen(msgspec.Struct, frozen=True):
    first: Any
    second: Any


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", validate_assignment=True)
    first: Any


class ModelFrozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)
    first: Any
    second: Any


@pydantic.dataclasses.dataclass
class ModelData:
    first: Any
    second: Any


class Plain(ABC, Generic[_T]):
    def __init__(self, first: Any, second: Any) -> None:
        self.first = first
        self.second = second


class Guarded(Plain):
    """An object whose attributes go through code of its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise AttributeError(f"{name} is set once")
        super().__setattr__(name, value)


class Slots:
    __slots__ = ("__second", "first", "unset")

    def __init__(self, first: Any, second: Any) -> None:
        self.first = first
        self.__second = second

    @property
    def second(self) -> Any:
        return self.__second


class SlotsAndMore(Slots):
    """A slot of the base, attributes of its own."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__(first, None)
        self.other = second

    @property
    def second(self) -> Any:
        return self.other


class UserData(collections.UserDict):
    pass


def _attributes(obj: Any) -> tuple[Any, Any]:
    return obj.first, obj.second


def _elements(obj: Any) -> tuple[Any, Any]:
    first, second = obj
    return first, second


def _items(obj: Any) -> tuple[Any, Any]:
    return obj["first"], obj["second"]


@dataclasses.dataclass
class Kind:
    """How to make one, how to look into it, and whether it is changed in place."""

    make: Callable[[Any, Any], Any]
    read: Callable[[Any], tuple[Any, Any]]
    in_place: bool = True


def _ordered(first: Any, second: Any) -> Any:
    return collections.OrderedDict([("first", first), ("second", second)])


def _default(first: Any, second: Any) -> Any:
    return collections.defaultdict(list, first=first, second=second)


def _table(first: Any, second: Any) -> Any:
    table = Table(first=first)
    table.second = second
    return table


def _unset(first: Any, second: Any) -> Any:
    obj = DataFrozenSlots.__new__(DataFrozenSlots)
    object.__setattr__(obj, "first", first)
    object.__setattr__(obj, "second", second)
    return obj


KINDS: dict[str, Kind] = {
    "dict": Kind(lambda a, b: {"first": a, "second": b}, _items),
    "OrderedDict": Kind(_ordered, _items),
    "defaultdict": Kind(_default, _items),
    "UserDict": Kind(lambda a, b: UserData(first=a, second=b), _items),
    "subclass of dict": Kind(_table, lambda obj: (obj["first"], obj.second)),
    "list": Kind(lambda a, b: [a, b], _elements),
    "subclass of list": Kind(lambda a, b: Items([a, b]), _elements),
    "deque": Kind(lambda a, b: collections.deque([a, b], maxlen=2), _elements),
    "tuple": Kind(lambda a, b: (a, b), _elements, in_place=False),
    "namedtuple": Kind(Named, _attributes, in_place=False),
    "subclass of namedtuple": Kind(NamedWithAttributes, _attributes, in_place=False),
    "set": Kind(lambda a, b: {a, b}, _elements),
    "frozenset": Kind(lambda a, b: frozenset([a, b]), _elements, in_place=False),
    "dataclass": Kind(Data, _attributes),
    "dataclass, slots": Kind(DataSlots, _attributes),
    "dataclass, frozen": Kind(DataFrozen, _attributes, in_place=False),
    "dataclass, frozen, slots, one unset": Kind(_unset, _attributes, in_place=False),
    "attrs": Kind(Attrs, _attributes),
    "attrs, frozen, hash kept": Kind(AttrsFrozen, _attributes, in_place=False),
    "attrs, frozen, no slots": Kind(AttrsFrozenDict, _attributes, in_place=False),
    "Struct": Kind(Struct, _attributes),
    "Struct, frozen": Kind(StructFrozen, _attributes, in_place=False),
    "pydantic, extra": Kind(lambda a, b: Model(first=a, second=b), _attributes),
    "pydantic, frozen": Kind(lambda a, b: ModelFrozen(first=a, second=b), _attributes, in_place=False),
    "pydantic dataclass": Kind(ModelData, _attributes),
    "SimpleNamespace": Kind(lambda a, b: types.SimpleNamespace(first=a, second=b), _attributes),
    "Namespace": Kind(lambda a, b: argparse.Namespace(first=a, second=b), _attributes),
    "plain object": Kind(Plain, _attributes),
    "plain object, __setattr__": Kind(Guarded, _attributes),
    "plain object, slots": Kind(Slots, _attributes),
    "plain object, slots and attributes": Kind(SlotsAndMore, _attributes),
}
