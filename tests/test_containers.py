"""What wrap and unwrap look into, and what they change there."""

from __future__ import annotations

import copy
import enum
import logging
import pickle
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

import shmx
from tests.blocks import block_of
from tests.containers import KINDS, Data, DataFrozen, Named, Plain, StructFrozen
from tests.patterns import is_pattern, pattern

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def is_shared(value):
    return isinstance(value, shmx.SharedTensor)


def held():
    return shmx.default_arena().stats()["held_blocks"]


@kinds
def test_both_places_get_handles_and_then_tensors_again(kind):
    request = kind.make(pattern(1), pattern(2))
    before = kind.read(request)
    wrapped = shmx.wrap(request)
    assert (wrapped is request) == kind.in_place
    assert type(wrapped) is type(request)
    assert all(map(is_shared, kind.read(wrapped)))
    if not kind.in_place:
        assert all(now is then for now, then in zip(kind.read(request), before, strict=True))
    unwrapped = shmx.unwrap(wrapped)
    assert (unwrapped is wrapped) == kind.in_place
    assert type(unwrapped) is type(request)
    seeds = [1 if is_pattern(tensor, 1) else 2 for tensor in kind.read(unwrapped)]
    assert sorted(seeds) == [1, 2]
    assert seeds == [1, 2] or isinstance(request, set | frozenset)
    assert all(is_pattern(tensor, seed) for tensor, seed in zip(kind.read(unwrapped), seeds, strict=True))


@kinds
def test_a_tensor_deep_inside_one_is_found(kind):
    inside = {"deep": [pattern(1)]}
    request = kind.make(Data(inside, None), "text") if "set" not in kind_name(kind) else [kind.make("a", "b"), inside]
    shmx.wrap(request)
    assert is_shared(inside["deep"][0])
    shmx.unwrap(request)
    assert is_pattern(inside["deep"][0], 1)


def kind_name(kind):
    return next(name for name, one in KINDS.items() if one is kind)


def read_all(connection, blob):
    wrapped = pickle.loads(blob)
    unwrapped = shmx.unwrap(wrapped)
    assert not shmx.has_shared(unwrapped)
    return {name: sorted(int(value[0]) for value in KINDS[name].read(obj)) for name, obj in unwrapped.items()}


def test_all_of_them_travel_to_another_process(children):
    # These two cannot be pickled, with or without tensors.
    picklable = {name: kind for name, kind in KINDS.items() if name != "subclass of dict" and "unset" not in name}
    requests = {name: kind.make(torch.full((9000,), 1.0), torch.full((9000,), 2.0)) for name, kind in picklable.items()}
    wrapped = shmx.wrap(requests, min_bytes=1000)
    with shmx.readers(1):
        blob = pickle.dumps(wrapped)
    del wrapped, requests
    assert children.start(read_all, blob).result() == {name: [1, 2] for name in picklable}


def test_an_unset_slot_stays_unset():
    kind = KINDS["dataclass, frozen, slots, one unset"]
    assert not hasattr(shmx.wrap(kind.make(pattern(1), pattern(2))), "unset")


def test_a_frozen_object_in_a_set_has_its_own_hash_afterwards():
    kind = KINDS["attrs, frozen, hash kept"]
    request = kind.make(pattern(1), pattern(2))
    hash(request)
    (member,) = shmx.wrap({request})
    assert hash(member) != hash(request)
    assert member in {member}


@pytest.mark.parametrize(
    "member", [DataFrozen, lambda *pair: (DataFrozen(*pair), 1), StructFrozen], ids=["frozen", "tuple of it", "Struct"]
)
def test_a_frozen_set_finds_what_is_in_it_afterwards(member):
    request = [frozenset([member(pattern(1), "text")])]
    for change in (shmx.wrap, shmx.unwrap):
        (inside,) = change(request)[0]
        assert inside in request[0]


class Rows(Named):
    def __iter__(self):
        return zip(self.first, self.second, strict=True)


class Backwards(list):
    def __iter__(self):
        return reversed(self)


class TensorsOnly(list):
    def __setitem__(self, index, value):
        raise TypeError("only tensors")


def test_what_a_subclass_says_of_its_elements_does_not_matter():
    rows, backwards, only = Rows([pattern(1)], [5]), Backwards([pattern(2), "text"]), TensorsOnly([pattern(3)])
    request = [rows, Rows(pattern(4), "text"), backwards, only]
    for change, kind in ((shmx.wrap, shmx.SharedTensor), (shmx.unwrap, torch.Tensor)):
        assert change(request) is request
        assert [type(one) for one in request] == [Rows, Rows, Backwards, TensorsOnly]
        places = [request[0].first[0], request[1].first, request[2][0], request[3][0]]
        assert [type(one) for one in places] == [kind] * 4
    assert all(is_pattern(tensor, seed) for tensor, seed in zip(places, (1, 4, 2, 3), strict=True))
    assert request[1].second == request[2][1] == "text"


def test_named_tuples_of_torch_are_made_anew():
    largest = torch.max(torch.rand(20_000, 2), dim=1)
    wrapped = shmx.wrap([largest])[0]
    assert type(wrapped) is type(largest)
    assert is_shared(wrapped.values)
    assert is_shared(wrapped.indices)
    assert torch.equal(shmx.unwrap(wrapped).values, largest.values)


# ---- shared references and cycles


def test_one_tensor_in_several_places_is_one_handle_and_one_tensor_again():
    tensor = pattern(1)
    request = {"a": tensor, "b": [tensor, (tensor,)], "c": Data(tensor, None)}
    shmx.wrap(request)
    assert request["a"] is request["b"][0] is request["b"][1][0] is request["c"].first
    shmx.unwrap(request)
    assert request["a"] is request["b"][0] is request["b"][1][0] is request["c"].first


def test_a_container_in_several_places_stays_one():
    for shared in (
        (pattern(1), 2),
        Named(pattern(1), 2),
        DataFrozen(pattern(1), 2),
        [pattern(1)],
        frozenset([pattern(1)]),
    ):
        request = [shared, {"again": shared}, (shared,)]
        request = shmx.unwrap(shmx.wrap(request))
        assert request[0] is request[1]["again"] is request[2][0]
        assert not shmx.has_shared(request)


def test_cycles_are_kept():
    request = Plain(pattern(1), [])
    request.second.append({"up": request})
    request.second.append((request, pattern(2)))
    frozen = DataFrozen(pattern(3), [])
    frozen.second.append(frozen)
    knot = DataFrozen.__new__(DataFrozen)
    object.__setattr__(knot, "first", pattern(4))
    object.__setattr__(knot, "second", (knot, frozen))
    for change in (shmx.wrap, shmx.unwrap):
        request, frozen, knot = change([request, frozen, knot])
        assert request.second[0]["up"] is request is request.second[1][0]
        assert frozen.second[0] is frozen
        assert knot.second[0] is knot
        assert knot.second[1] is frozen
    assert is_pattern(request.first, 1)
    assert is_pattern(request.second[1][1], 2)
    assert is_pattern(frozen.first, 3)
    assert is_pattern(knot.first, 4)


def test_a_frozen_object_closes_a_cycle_wherever_it_is_in_it(registered):
    shmx.register_container(Ring, lambda one: ([one.first, one.second], None), lambda values, _: Ring(*values))
    frozen = DataFrozen(pattern(1), Ring(pattern(2), None))
    frozen.second.second = (frozen, frozenset([pattern(3)]))
    for start in (frozen, frozen.second, frozen.second.second):
        ring = start
        for change, kind in ((shmx.wrap, shmx.SharedTensor), (shmx.unwrap, torch.Tensor)):
            ring = change(ring)
            while not isinstance(ring, DataFrozen):
                ring = ring.second if isinstance(ring, Ring) else ring[0]
            assert ring.second.second[0] is ring
            assert [type(one) for one in (ring.first, ring.second.first, *ring.second.second[1])] == [kind] * 3


@pytest.mark.parametrize("nest", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"in": inner}, Plain])
def test_depth_has_no_limit(nest):
    request = pattern(1)
    for _ in range(20 * sys.getrecursionlimit()):
        request = nest(request) if nest is not Plain else Plain(request, None)
    request = shmx.wrap(request)
    assert shmx.has_shared(request)
    request = shmx.unwrap(request)
    assert not shmx.has_shared(request)
    while not isinstance(request, torch.Tensor):
        request = (
            request.first
            if isinstance(request, Plain)
            else next(iter(request.values() if isinstance(request, dict) else request))
        )
    assert is_pattern(request, 1)


# ---- containers of one's own


class Sealed:
    """Gives away what it contains only by a method."""

    def __init__(self, tensors, label):
        self.give = lambda: list(tensors)
        self.label = label


class Broken(Plain):
    pass


class Ring(Plain):
    pass


@pytest.fixture
def registered():
    from shmx import walk

    yield
    walk._registered.clear()
    for table in walk._tables:
        table.forget()


def test_a_registered_container_is_taken_apart_and_made_again(registered):
    shmx.register_container(Sealed, lambda one: (one.give(), one.label), Sealed)
    request = [Sealed([pattern(1), "text", [pattern(2)]], "label")]
    before = request[0]
    shmx.wrap(request)
    assert request[0] is not before
    assert request[0].label == "label"
    assert is_shared(request[0].give()[0])
    shmx.unwrap(request)
    first, text, (second,) = request[0].give()
    assert text == "text"
    assert is_pattern(first, 1)
    assert is_pattern(second, 2)


def test_flatten_may_make_its_values_as_it_is_called(registered):
    shmx.register_container(
        Sealed, lambda one: ([pattern(one.label)], one.label + 1), lambda values, context: (values, context)
    )
    (values, context) = shmx.wrap(Sealed([], 5))
    assert context == 6
    assert is_pattern(values[0].view(), 5)


def test_a_registered_container_without_tensors_is_left_alone(registered):
    shmx.register_container(Sealed, lambda one: (one.give(), one.label), Sealed)
    request = [Sealed(["text"], "label"), pattern(1)]
    before = request[0]
    assert shmx.wrap(request)[0] is before


def test_one_that_cannot_be_made_again_changes_nothing(registered):
    def refuse(values, context):
        raise RuntimeError("not today")

    shmx.register_container(Broken, lambda one: ([one.first], None), refuse)
    tensor, other = pattern(1), pattern(2)
    inner = [other]
    request = {"inner": inner, "broken": Broken(tensor, None), "tuple": (other,)}
    blocks = held()
    with pytest.raises(RuntimeError, match="not today"):
        shmx.wrap(request)
    assert inner[0] is other
    assert request["broken"].first is tensor
    assert request["tuple"][0] is other
    assert held() == blocks


def test_a_registered_container_that_contains_itself_is_refused(registered):
    shmx.register_container(Ring, lambda one: ([one.first, one.second], None), lambda values, _: Ring(*values))
    ring = Ring(pattern(1), None)
    ring.second = ring
    with pytest.raises(TypeError, match="Ring contains itself"):
        shmx.wrap([ring])
    assert isinstance(ring.first, torch.Tensor)


def test_what_is_built_in_cannot_be_registered():
    for cls in (dict, tuple, int):
        with pytest.raises(TypeError, match="built in"):
            shmx.register_container(cls, lambda one: ([], None), lambda values, context: None)
    with pytest.raises(TypeError, match="takes a class"):
        shmx.register_container("dict", lambda one: ([], None), lambda values, context: None)


# ---- what cannot be changed, and what is not looked into


def test_a_container_that_refuses_leaves_the_others_as_they_were():
    # An array cannot be in a set.
    request = shmx.wrap(
        [[pattern(0)], {pattern(1), "text"}, {shmx.wrap(np.arange(20_000))}, [pattern(2)], {"and": pattern(3)}]
    )
    first, other, refusing, last, table = request
    before = [first[0], set(other), set(refusing), last[0], table["and"]]
    with pytest.raises(TypeError, match="unhashable"):
        shmx.unwrap(request)
    assert [first[0], other, refusing, last[0], table["and"]] == before
    assert is_pattern(first[0].view(), 0)


class Color(enum.Enum):
    RED = torch.zeros(20_000)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", pattern(1))


class Worker(threading.Thread):
    def __init__(self):
        super().__init__()
        self.tensor = pattern(1)

    def give(self):
        return self.tensor


def opaque_objects():
    module = Encoder()
    error = ValueError(pattern(1))
    handler = logging.NullHandler()
    handler.tensor = pattern(1)
    return {
        "torch module": (module, lambda: module.scale),
        "enum": (Color.RED, lambda: Color.RED.value),
        "exception": (error, lambda: error.args[0]),
        "thread": ((worker := Worker()), lambda: worker.tensor),
        "logging": (handler, lambda: handler.tensor),
        "key of a dict": ((table := {pattern(1): 1}), lambda: next(iter(table))),
        "class": ((cls := type("Cls", (), {"tensor": pattern(1)})), lambda: cls.tensor),
        "mapping proxy": ((proxy := types.MappingProxyType({"tensor": pattern(1)})), lambda: proxy["tensor"]),
        "generator": ((numbers := (pattern(seed) for seed in range(1))), lambda: next(numbers)),
        "method": ((method := worker.give), lambda: method()),
    }


@pytest.mark.parametrize("name", opaque_objects())
def test_machinery_is_not_looked_into(name):
    obj, read = opaque_objects()[name]
    assert shmx.wrap([obj])[0] is obj
    assert isinstance(read(), torch.Tensor)


def test_nothing_is_imported_for_the_sake_of_a_class():
    code = (
        "import sys, shmx, types; shmx.wrap([types.SimpleNamespace(a=1)]); "
        "print({'attr', 'msgspec', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_a_class_of_no_module_is_looked_into():
    obj = type("Nowhere", (), {"__module__": None})()
    obj.tensor = pattern(1)
    assert is_shared(shmx.wrap(obj).tensor)


def test_classes_by_the_thousand_are_not_kept():
    from shmx import hooks, walk

    for number in range(walk._KNOWN_AT_MOST + 10):
        shmx.has_shared(type(f"Cls{number}", (), {})())
    assert len(hooks._SHARED.known) <= walk._KNOWN_AT_MOST
    assert is_shared(shmx.wrap([Plain(pattern(1), 2)])[0].first)


def test_the_object_is_as_good_as_a_deep_copy_of_it():
    request = [Data(pattern(1), (pattern(2), Named(3, pattern(4)))), {"k": [pattern(5)]}]
    again = copy.deepcopy(request)
    shmx.unwrap(shmx.wrap(again))
    assert torch.equal(again[0].first, request[0].first)
    assert torch.equal(again[0].second[1].second, request[0].second[1].second)
    assert again[0].rid == request[0].rid


def test_all_tensors_of_an_object_share_one_block():
    request = shmx.wrap([Data(pattern(1), (pattern(2),)), {"k": [pattern(3)]}])
    blocks = {block_of(handle) for handle in (request[0].first, request[0].second[0], request[1]["k"][0])}
    assert len(blocks) == 1
