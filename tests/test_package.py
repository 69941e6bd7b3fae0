"""What is installed: what the core links, what the import brings in, names, types and the command."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shmx
from shmx import _core, cli
from tests.blocks import names_of

PACKAGE = Path(shmx.__file__).parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


# ---- the core


def needed_libraries(path: Path) -> list[str]:
    """The NEEDED entries of a 64-bit little-endian ELF file's dynamic section."""
    image = path.read_bytes()
    assert image[:6] == b"\x7fELF\x02\x01"
    sections, entry_size, count = struct.unpack_from("<40xQ10xHH", image)
    tables = []
    for index in range(count):
        _, kind, _, _, offset, size, link, _, _, _ = struct.unpack_from(
            "<IIQQQQIIQQ", image, sections + index * entry_size
        )
        tables.append((kind, offset, size, link))
    (dynamic,) = (table for table in tables if table[0] == 6)
    strings = tables[dynamic[3]][1]
    found = []
    for position in range(dynamic[1], dynamic[1] + dynamic[2], 16):
        tag, value = struct.unpack_from("<qQ", image, position)
        if tag == 1:
            start = strings + value
            found.append(image[start : image.index(b"\0", start)].decode())
    return found


def test_the_core_links_the_c_and_c_plus_plus_libraries_and_nothing_else():
    found = needed_libraries(Path(_core.__file__))
    allowed = ("libstdc++.", "libm.", "libgcc_s.", "libc.", "libpthread.", "librt.", "libdl.", "ld-linux")
    assert any(name.startswith("libc.so") for name in found)
    assert [name for name in found if not name.startswith(allowed)] == []


def test_the_elf_reader_sees_torch_where_torch_is_linked():
    linked = needed_libraries(Path(torch._C.__file__))
    assert any("torch" in name for name in linked)


# ---- the import


def test_import_brings_in_neither_the_demos_packages_nor_the_driver():
    result = run("-c", "import sys, shmx; print(*sys.modules); print(open('/proc/self/maps').read())")
    assert result.returncode == 0, result.stderr
    modules, maps = result.stdout.split("\n", 1)
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert {"torch", "shmx"} <= loaded
    assert not loaded & {"zmq", "skimage", "rich", "PIL", "pytest", "cloudpickle", "msgspec"}
    assert "libcuda.so" not in maps
    assert result.stderr == ""


def test_import_makes_no_segment_and_starts_no_thread_or_process():
    code = """
import os, threading, multiprocessing
import torch
before = set(os.listdir('/dev/shm')), len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd'))
import shmx
after = set(os.listdir('/dev/shm')), len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd'))
mine = {name for name in after[0] - before[0] if name.startswith('shmx-')}
assert not mine or shmx.stats()['arena'] is None, mine
assert after[1:] == before[1:], (before[1:], after[1:])
assert not multiprocessing.active_children()
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_modules_that_the_import_leaves_out_are_attributes_all_the_same():
    code = """
import sys, shmx
assert {"distributed", "integrations"} <= set(dir(shmx))
assert not {"shmx.distributed", "shmx.integrations"} & set(sys.modules)
assert callable(shmx.distributed.agree)
assert callable(shmx.integrations.sglang.install)
assert "sglang" not in sys.modules
assert not hasattr(shmx, "no_such_name")
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_import_elsewhere_than_on_linux_says_so(platform):
    result = run("-c", f"import sys; sys.platform = {platform!r}\nimport shmx")
    assert result.returncode == 1
    assert f"ImportError: shmx runs on Linux only, not on {platform}" in result.stderr


# ---- names


def modules() -> list[str]:
    """The modules of the package, but for the command's, which runs it, and the benchmarks, which are no API."""
    found = ["shmx"]
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__", "bench"):
            found.append(".".join(("shmx", *parts)).removesuffix(".__init__"))
    return found


def test_every_name_in_all_is_there_once_and_in_order():
    names = modules()
    assert {"shmx", "shmx.arena", "shmx.cli", "shmx.config", "shmx.errors"} <= set(names)
    for name in names:
        module = importlib.import_module(name)
        exported = module.__all__
        assert list(exported) == sorted(set(exported)), name
        for one in exported:
            assert hasattr(module, one), f"{name}.{one}"


def test_every_public_name_of_the_package_is_in_all():
    submodules = {name.rpartition(".")[2] for name in modules()} | {"bench"}
    public = {name for name in vars(shmx) if not name.startswith("_")} - submodules
    assert public == set(shmx.__all__)


def test_every_public_object_has_a_docstring_and_a_home():
    for name in shmx.__all__:
        one = getattr(shmx, name)
        assert one.__doc__, name
        assert one.__module__.partition(".")[0] == "shmx", name


def test_every_public_method_of_arenas_and_handles_has_a_docstring():
    for one in (shmx.Arena, shmx.SharedTensor):
        for member in (name for name in dir(one) if not name.startswith("_")):
            assert (getattr(one, member).__doc__ or "").strip(), f"{one.__name__}.{member}"


def test_the_version_is_the_distributions():
    assert shmx.__version__ == importlib.metadata.version("torch-shmx")


# ---- types


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement
        elif isinstance(statement, ast.Assign):
            found.update({target.id: statement for target in statement.targets if isinstance(target, ast.Name)})
    return found


# Of every Python or pybind11 class: nothing for a stub to tell.
COMMON = {"__module__", "__doc__", "__new__", "__getstate__", "__hash__", "__dict__", "__weakref__", "__annotations__"}


def is_told(name: str) -> bool:
    return not name.startswith("_pybind11") and name not in COMMON and (not name.startswith("_") or name.endswith("__"))


def test_the_stub_names_exactly_what_the_core_has():
    stub = members(ast.parse((PACKAGE / "_core.pyi").read_text()).body)
    module = {name for name in vars(_core) if not name.startswith("_")}
    assert set(stub) == module
    for name, statement in stub.items():
        one = getattr(_core, name)
        assert isinstance(one, type) == isinstance(statement, ast.ClassDef), name
        if isinstance(statement, ast.ClassDef):
            told = members(statement.body)
            assert set(told) == {member for member in vars(one) if is_told(member)}, name
            for member, definition in told.items():
                if not isinstance(definition, ast.FunctionDef):
                    continue
                decorators = {ast.unparse(decorator) for decorator in definition.decorator_list}
                inside = vars(one)[member]
                assert isinstance(inside, property) == ("property" in decorators), f"{name}.{member}"
                assert isinstance(inside, staticmethod) == ("staticmethod" in decorators), f"{name}.{member}"
        elif isinstance(statement, ast.AnnAssign):
            assert type(one).__name__ == ast.unparse(statement.annotation).partition("[")[0], name


def test_the_stub_names_the_parameters_that_the_core_takes():
    stub = members(ast.parse((PACKAGE / "_core.pyi").read_text()).body)
    checked = 0
    for name, statement in stub.items():
        one = getattr(_core, name)
        body = members(statement.body) if isinstance(statement, ast.ClassDef) else {name: statement}
        for member, definition in body.items():
            if not isinstance(definition, ast.FunctionDef) or definition.args.kwarg or definition.decorator_list:
                continue
            if not isinstance(one, type) or member == "__init__":
                function = one
            elif not member.startswith("__"):
                function = getattr(one, member)
            else:
                continue
            # pybind11 tells a signature when it refuses an argument.
            with pytest.raises(TypeError) as caught:
                function(no_such_argument=None)
            signature = next(line for line in str(caught.value).splitlines() if line.lstrip().startswith("1. "))
            arguments = definition.args
            for argument in [*arguments.args, *arguments.kwonlyargs]:
                if argument.arg != "self":
                    assert f"{argument.arg}: " in signature, f"{name}.{member}: {signature}"
            told = len(arguments.args) + len(arguments.kwonlyargs)
            if member == "__init__":
                told -= 1  # self, which pybind11 leaves out there
            taken = signature.rpartition(" -> ")[0] or signature
            assert taken.partition("(")[2].count(": ") == told, f"{name}.{member}: {signature}"
            checked += 1
    assert checked > 20


# ---- the command


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="shmx")
    assert script.load() is cli.main


def test_python_m_shmx_is_the_command():
    result = run("-m", "shmx", "--version")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, shmx.__version__, "")
    result = run("-m", "shmx", "no-such-command")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no such command: no-such-command" in result.stderr


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_lists_the_commands(argument, capsys):
    assert cli.main([argument]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for command in ("bench", "demo", "doctor", "gc", "ls"):
        assert f"\n  {command}" in output.out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], [""]])
def test_no_command_or_an_unknown_one_is_status_2_and_usage_on_stderr(arguments, capsys):
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "usage: shmx COMMAND" in output.err
    if arguments:
        assert f"no such command: {arguments[0]}" in output.err


def test_an_unknown_option_of_a_command_is_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["gc", "--nonsense"])
    assert caught.value.code == 2
    assert "shmx gc" in capsys.readouterr().err


@pytest.mark.needs_names
def test_gc_reports_every_arena_and_leaves_those_in_use(capsys, children):
    child = children.start(owns_an_arena)
    name = child.receive()
    assert cli.main(["gc", "--json"]) == 0
    report = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert report[name]["outcome"] == "owner alive"
    assert report[name]["bytes"] >= 4096
    assert set(report[name]) == {"name", "outcome", "reason", "bytes"}
    assert cli.main(["gc", "--force"]) == 0
    assert f"{name}  owner alive" in capsys.readouterr().out
    child.kill()
    assert cli.main(["gc"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{name}  removed") for line in lines)
    assert lines[-1].endswith(f"of {len(lines) - 1}")
    assert not (Path("/dev/shm") / name.removeprefix("/")).exists()


def owns_an_arena(connection):
    handle = shmx.share(torch.zeros(1000))
    connection.send(shmx.default_arena().name)
    connection.recv()
    return handle.nbytes


@pytest.mark.needs_names
def test_gc_of_nothing_says_so(capsys):
    assert cli.main(["gc"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:3] == ["removed", "of"]
    arena = shmx.default_arena()
    assert cli.main(["gc", "--force"]) == 0
    assert names_of(arena)  # one's own arena is none of its business
