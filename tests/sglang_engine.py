"""The real SGLang, driven as its engine drives it: a tokenizer's sends, and ranks that receive.

SGLang imports everything that it may ever need. Packages that are not installed here are answered by empty modules;
SGLang's own modules all run as they are. What only a launched server knows (its configuration, its groups) is stated.
"""

from __future__ import annotations

import copy
import datetime
import importlib.util
import os
import pickle
import random
import sys
import time
import warnings
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import shmx
from shmx.integrations import sglang as integration
from tests.children import BOUND
from tests.patterns import is_pattern, pattern

VERSION = "0.5.23"
# What it imports and a CPU needs not.
_NOT_NEEDED = """
    torchvision sgl_kernel flashinfer torchaudio torchao torchcodec decord decord2 flash_attn quack cutlass
    nvidia_cutlass_dsl sgl_deep_gemm deep_gemm tilelang outlines llguidance timm soundfile av modelscope blobfile gguf
    hf_transfer kernels sglang_router smg_grpc_servicer smg_grpc_proto mooncake flash_attn_4 quixicore
"""
_LAZY = (
    *("AutoProcessor", "AutoConfig", "AutoTokenizer", "AutoImageProcessor", "PretrainedConfig"),
    *("PreTrainedTokenizerBase", "ProcessorMixin", "BatchFeature"),
)


def why_not() -> str | None:
    """Why its functions cannot run here."""
    for name in ("sglang", "transformers", "orjson", "zmq"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; docs/sglang.md has the command"
    found = importlib.metadata.version("sglang")
    return None if found == VERSION else f"sglang {found} is installed, not {VERSION}"


class _Nothing(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Nothing(cls.__name__, (), {})


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Nothing(name, (), {})
        setattr(self, name, value)
        return value


class _EmptyModules(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in _NOT_NEEDED.split():
            return None
        spec = ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = []
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def load() -> SimpleNamespace:
    """SGLang's modules by short names; takes seconds in a process that has not imported them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        # These ask what is installed, and must be told the truth.
        for name in _LAZY:
            getattr(transformers, name)
        sys.meta_path.append(_EmptyModules())
        from sglang.srt import runtime_context
        from sglang.srt.managers import io_struct, mm_utils, schedule_batch, scheduler_pp_mixin
        from sglang.srt.managers.scheduler_components import request_receiver
        from sglang.srt.sampling.sampling_params import SamplingParams
        from sglang.srt.utils import common
    return SimpleNamespace(
        context=runtime_context,
        io=io_struct,
        mm=mm_utils,
        batch=schedule_batch,
        pipeline=scheduler_pp_mixin,
        receiver=request_receiver,
        common=common,
        SamplingParams=SamplingParams,
    )


@dataclass(frozen=True)
class Layout:
    """Ranks of an engine: `tp` in each of `pp` pipeline stages, in `dp` attention groups."""

    tp: int
    dp: int = 1
    pp: int = 1
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.pp


def configure(on_shmx: bool, nodes: int = 1, pickled: bool = False) -> SimpleNamespace:
    """The package, with what its server would have published."""
    sgl = load()
    if on_shmx:
        integration.install()
    torch.set_num_threads(1)
    sgl.io._USE_PICKLE_IPC = pickled
    sgl.context.get_parallel().override_permanently(nnodes=nodes, dp_size=1, attn_dp_size=1)
    sgl.mm.get_serving = lambda: SimpleNamespace(skip_tokenizer_init=False)
    sgl.receiver.get_disagg = lambda: SimpleNamespace(language_only=False)
    return sgl


# ---- the tokenizer ----


def request(number: int, tensors: list[torch.Tensor], hashes: bool = True) -> Any:
    """A request with an image for each tensor."""
    sgl = load()
    items = [
        sgl.batch.MultimodalDataItem(
            modality=sgl.batch.Modality.IMAGE, feature=tensor, hash=number * 1000 + index + 1 if hashes else None
        )
        for index, tensor in enumerate(tensors)
    ]
    return sgl.io.TokenizedGenerateReqInput(
        rid=str(number),
        input_text="",
        input_ids=array("q", [1, 2, 3]),
        input_embeds=None,
        mm_inputs=sgl.batch.MultimodalProcessorOutput(mm_items=items),
        token_type_ids=None,
        sampling_params=sgl.SamplingParams(),
        return_logprob=False,
        logprob_start_len=0,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


def sample_of(original: Any) -> Any:
    """What the tokenizer sends for one of n samples: items of their own, the same tensors."""
    same = copy.copy(original)
    same.mm_inputs = copy.copy(original.mm_inputs)
    same.mm_inputs.mm_items = [copy.copy(item) for item in original.mm_inputs.mm_items]
    return same


def wrapped(sgl: SimpleNamespace, original: Any) -> Any:
    one = sgl.mm.wrap_shm_features(original)
    one.wrap_pickle_fields()
    return one


def features_of(number: int, count: int, size: int) -> list[torch.Tensor]:
    return [pattern(number * 16 + index, size).reshape(-1, 16) for index in range(count)]


def address(folder: Path, group: int) -> str:
    return f"ipc://{folder}/tokenizer-{group}"


@dataclass(frozen=True)
class Plan:
    """What goes through an engine, and how."""

    layout: Layout
    requests: int = 60
    samples: int = 1
    images: int = 2
    bytes: int = 64 << 10
    # Which processes are on shmx.
    tokenizer: bool = True
    ranks: bool = True
    pickled: bool = False
    # SGLang's barrier before features are materialized.
    barrier: bool = True
    # The most work, at random, between receiving and unpickling, and before materializing.
    work: int = 20
    capacity: int | None = None
    # A request whose data is taken away, and one that a single rank cannot materialize.
    revoked: int = -1
    refused: int = -1

    def expected(self, group: int) -> int:
        """Requests for an attention group."""
        return self.samples * sum(number % self.layout.dp == group for number in range(self.requests))


def tokenize(connection, folder, plan):
    """Send every request to its attention group; returns how many features went inline, and the largest message."""
    import zmq

    sgl = configure(plan.tokenizer, plan.layout.nodes, plan.pickled)
    if plan.capacity is not None:
        shmx.configure(capacity=plan.capacity)
    inline, largest = 0, 0
    with zmq.Context() as context:
        sockets = [context.socket(zmq.PUSH) for _ in range(plan.layout.dp)]
        for group, socket in enumerate(sockets):
            socket.set(zmq.SNDHWM, 0)
            socket.bind(address(folder, group))
        for number in range(plan.requests):
            tokenized = request(number, features_of(number, plan.images, plan.bytes))
            for _ in range(plan.samples):
                one = wrapped(sgl, sample_of(tokenized) if plan.samples > 1 else tokenized)
                features = [item.feature for item in one.mm_inputs.mm_items]
                inline += sum(isinstance(feature, torch.Tensor) for feature in features)
                sent = Measured(sockets[number % plan.layout.dp])
                sgl.io.sock_send(sent, one)
                largest = max(largest, sent.bytes)
                if number == plan.revoked:
                    features[0]._shared.revoke()
        connection.send("sent")
        connection.recv()
        for socket in sockets:
            socket.close(linger=int(BOUND * 1000))
    return inline, largest


class Measured:
    """A socket, and how much it has sent."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.bytes = 0

    def send(self, data: bytes, flags: int = 0) -> None:
        self.bytes += len(data)
        self._socket.send(data, flags=flags)

    def send_pyobj(self, obj: Any, flags: int = 0, protocol: int = pickle.HIGHEST_PROTOCOL) -> None:
        self.send(pickle.dumps(obj, protocol), flags)


def route(connection, folder, target, plan):
    """Decode and encode again, as a data-parallel controller does."""
    import zmq

    sgl = configure(plan.tokenizer)
    with zmq.Context() as context:
        pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        pull.connect(address(folder, 0))
        push.bind(address(target, 0))
        for _ in range(plan.expected(0)):
            sgl.io.sock_send(push, sgl.io.sock_recv(pull))
        connection.send("routed")
        connection.recv()
        pull.close(linger=0)
        push.close(linger=int(BOUND * 1000))


# ---- the ranks ----


class Group(SimpleNamespace):
    """As SGLang's GroupCoordinator, as far as requests go."""


def _group(rank: int, lists: list[list[int]]) -> Group:
    mine = None
    for ranks in lists:
        made = dist.new_group(ranks, backend="gloo", timeout=datetime.timedelta(seconds=BOUND))
        if rank in ranks:
            mine = Group(rank=rank, ranks=ranks, cpu_group=made, world_size=len(ranks), rank_in_group=ranks.index(rank))
    assert mine is not None
    return mine


class Engine:
    """One scheduler rank: its groups, and a receiver of requests."""

    def __init__(self, folder: Path, layout: Layout, rank: int, context: Any) -> None:
        self.sgl = load()
        self.layout = layout
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/gloo",
            rank=rank,
            world_size=layout.world,
            timeout=datetime.timedelta(seconds=BOUND),
        )
        tp, attention = layout.tp, layout.tp // layout.dp
        self.stage, inside = divmod(rank, tp)
        world = _group(rank, [list(range(layout.world))])
        groups = {
            "tp_group": _group(rank, [list(range(s * tp, (s + 1) * tp)) for s in range(layout.pp)]),
            "attn_tp_group": _group(rank, [list(range(s, s + attention)) for s in range(0, layout.world, attention)]),
            "attn_cp_group": _group(rank, [[one] for one in range(layout.world)]),
        }
        sgl = self.sgl
        sgl.context.get_parallel().override_permanently(
            tp_size=tp,
            pp_size=layout.pp,
            attn_dp_size=layout.dp,
            attn_tp_size=attention,
            attn_cp_size=1,
            attn_dp_enabled=layout.dp > 1,
            tp_rank=inside,
            pp_rank=self.stage,
            attn_dp_rank=inside // attention,
            attn_tp_rank=inside % attention,
            attn_cp_rank=0,
            world_group=world,
            enable_dp_attention_local_control_broadcast=True,
            **groups,
        )
        self.world = SimpleNamespace(world_group=world)
        self.leads = self.stage == 0 and inside % attention == 0
        self.attention_group = inside // attention
        import zmq

        requests, rpc = context.socket(zmq.PULL), context.socket(zmq.PULL)
        self.sockets = (requests, rpc)
        if self.leads:
            requests.connect(address(folder, self.attention_group))
        self.receiver = sgl.receiver.SchedulerRequestReceiver(
            recv_from_tokenizer=requests,
            recv_from_rpc=rpc,
            recv_skipper=None,
            input_blocker=None,
            mm_receiver=None,
            server_args=None,
            model_config=SimpleNamespace(is_multimodal=True),
            # One request a turn, as they come in without a backlog.
            max_recv_per_poll=1,
            stream_output=lambda *_: None,
            get_last_batch=lambda: None,
        )

    def step(self) -> list[Any]:
        """One turn of the event loop, as far as requests go."""
        received = self.receiver.recv_requests()
        if self.stage + 1 < self.layout.pp:
            self.sgl.pipeline.SchedulerPPMixin._pp_send_pyobj_to_next_stage(self.world, received)
        return received

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(linger=0)
        dist.destroy_process_group()


def judge(sgl: SimpleNamespace, one: Any, count: int, size: int) -> str:
    """What became of a received request; writes over its features, which nobody else may see."""
    if isinstance(one.mm_inputs, sgl.io.MMInputsProcessError):
        return "lost"
    number = int(one.rid)
    features = [item.feature for item in one.mm_inputs.mm_items]
    if len(features) != count or not all(type(feature) is torch.Tensor for feature in features):
        return "not unwrapped"
    right = all(
        feature.nbytes == size and is_pattern(feature.reshape(-1), number * 16 + index)
        for index, feature in enumerate(features)
    )
    for feature in features:
        feature.fill_(-1)
    return "right" if right else "wrong"


def serve(connection, folder, plan, rank):
    """Receive the requests of this rank's attention group; what became of them, and how many barriers there were."""
    import zmq

    sgl = configure(plan.ranks, plan.layout.nodes, plan.pickled)
    choose = random.Random(rank)
    barriers = 0
    barrier, unwrap, broadcast = dist.barrier, sgl.receiver.unwrap_shm_features, dist.broadcast

    def dawdle():
        for _ in range(choose.randrange(plan.work)):
            zlib.crc32(bytes(32 << 10))

    def counted_barrier(*args, **kwargs):
        nonlocal barriers
        barriers += 1
        return barrier(*args, **kwargs) if plan.barrier else None

    def late_broadcast(*args, **kwargs):
        broadcast(*args, **kwargs)
        # The source goes on at once; the others find time to unpickle later.
        if rank > 0:
            dawdle()

    def late_unwrap(one):
        dawdle()
        if rank == 1 and int(one.rid) == plan.refused:
            raise RuntimeError("refused on purpose")
        return unwrap(one)

    # As `install` finds it: the barrier that it may leave out is this one.
    integration.uninstall()
    sgl.receiver.barrier = counted_barrier
    if plan.ranks:
        integration.install()
    sgl.receiver.unwrap_shm_features = late_unwrap
    sgl.receiver.logger.disabled = True
    dist.broadcast = late_broadcast
    outcome: Counter[str] = Counter()
    with zmq.Context() as context:
        engine = Engine(folder, plan.layout, rank, context)
        try:
            while outcome.total() < plan.expected(engine.attention_group):
                for one in engine.step():
                    outcome[judge(sgl, one, plan.images, plan.bytes)] += 1
            connection.send("done")
            connection.recv()
        finally:
            engine.close()
    if shmx.stats()["arena"] is not None:
        outcome["copied by a rank"] += 1
    return outcome, barriers


# ---- the same engine, one transport after the other ----

WAYS = ("shmx", "own", "inline")


def switch(way: str) -> None:
    """Let SGLang transport features on shmx, by its own segments, or in the message."""
    sgl = load()
    integration.uninstall()
    if way == "shmx":
        integration.install()
    else:
        sgl.mm._is_default_tensor_transport = way == "inline"


def tokenize_in_turns(connection, folder, images, size):
    """For each order (way, number) one request; answers when it began to wrap, and the bytes of the message."""
    import zmq

    sgl = configure(on_shmx=False)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.bind(address(folder, 0))
        while (order := connection.recv()) is not None:
            way, number = order
            switch(way)
            tokenized = request(number, features_of(number, images, size))
            began = time.monotonic_ns()
            sent = Measured(socket)
            sgl.io.sock_send(sent, wrapped(sgl, tokenized))
            connection.send((began, sent.bytes))


def serve_in_turns(connection, folder, layout, rank, images, size):
    """For each way one request; answers when its features had been read, and what became of it."""
    import zmq

    sgl = configure(on_shmx=False)
    with zmq.Context() as context:
        engine = Engine(folder, layout, rank, context)
        while (way := connection.recv()) is not None:
            switch(way)
            connection.send("ready")
            received: list[Any] = []
            while not received:
                received = engine.step()
            (one,) = received
            if not isinstance(one.mm_inputs, sgl.io.MMInputsProcessError):
                for item in one.mm_inputs.mm_items:
                    item.feature.sum()
            read = time.monotonic_ns()
            connection.send((read, judge(sgl, one, images, size)))
        engine.close()
