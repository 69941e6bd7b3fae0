"""`shmx demo`: what a user sees, and the images and the opponent that it is made of."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("zmq")
pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("skimage")

from PIL import Image
from shmx.bench import demo, demo_run, images, reference_segment

TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return images.load_photographs()


@pytest.fixture
def image_folder(tmp_path: Path, photographs: list[Image.Image]) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, photograph in enumerate(photographs[8:11]):
        photograph.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def prefix() -> Iterator[str]:
    prefix = f"psm_test_{secrets.token_hex(4)}_"
    yield prefix
    reference_segment.remove_left(prefix)


@contextlib.contextmanager
def started_demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command as a user would, and leave none of its processes behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shmx", "demo", *arguments],
        # Outside the checkout, where the source folder would hide an installed package.
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Also bounds the reading of a line of progress.
    watchdog = threading.Timer(TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        watchdog.cancel()
        process.communicate()


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with started_demo(folder, *arguments) as process:
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


# ---- the command ----


def test_shmx_delivers_every_tensor_unchanged(image_folder: Path) -> None:
    done = run_demo(image_folder, "--requests", "2", "--ranks", "2", "--json", "--images", ".")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["images"] == 3
    shmx, inline = result["transports"]["shmx"], result["transports"]["inline"]
    assert (shmx["loads"], shmx["lost"], shmx["wrong"], shmx["left"]) == (2 * 2 * 3, 0, 0, [])
    assert (inline["loads"], inline["lost"], inline["wrong"]) == (2 * 2 * 3, 0, 0)
    assert result["transports"]["segment"]["wrong"] == 0
    assert shmx["steady"]["wire_bytes"] < 10_000
    assert inline["steady"]["wire_bytes"] > 1_000_000


def test_table_names_the_transports_and_how_they_were_measured(tmp_path: Path, photographs: list[Image.Image]) -> None:
    photographs[8].save(tmp_path / "one.webp")
    done = run_demo(
        tmp_path, "--requests", "1", "--ranks", "1", "--transports", "inline,shmx", "--images", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    for word in ("shmx", "inline", "on the wire", "tensors lost", "CLOCK_MONOTONIC", "Medians"):
        assert word in done.stdout


def test_directory_without_images_is_a_usage_error(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--images", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"no images in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_broken_image_is_a_usage_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a photograph")
    done = run_demo(tmp_path, "--images", str(tmp_path), "--ranks", "1")
    assert done.returncode == 2
    assert f"cannot decode {tmp_path / 'broken.jpg'}" in done.stderr
    assert "Traceback" not in done.stderr


class InterruptedAtTheStart(demo_run.Processes):
    def _start(self, *arguments: Any) -> None:
        super()._start(*arguments)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_processes_are_started_is_not_lost() -> None:
    processes = InterruptedAtTheStart(demo_run.Plan.make(2, None))
    with pytest.raises(KeyboardInterrupt), processes:
        pytest.fail("the interrupt was lost")
    assert [process.is_alive() for process, _ in processes._children] == [False] * 3
    assert not processes.plan.folder.exists()


def test_interrupted_run_ends_with_130_and_leaves_nothing(image_folder: Path) -> None:
    """The fixture `leaves_nothing` looks at /dev/shm."""
    with started_demo(
        image_folder, "--requests", "10000", "--ranks", "2", "--transports", "shmx,segment", "--images", "."
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.endswith("shmx demo: interrupted\n")
    assert "Traceback" not in stderr


def test_death_of_a_rank_ends_the_run_with_its_name(image_folder: Path) -> None:
    with started_demo(
        image_folder, "--requests", "10000", "--ranks", "2", "--transports", "shmx", "--images", "."
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        os.kill(last_child(process.pid), signal.SIGKILL)
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert "rank 1 ended with exit status -9" in stderr


def last_child(pid: int) -> int:
    """The youngest child: the processes are started in the order producer, rank 0, rank 1."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(int(child) for child in children)


@pytest.mark.parametrize("arguments", [("--transports", "pigeon"), ("--ranks", "0"), ("--requests", "-1")])
def test_impossible_option_is_a_usage_error(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(list(arguments))
    assert stopped.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_missing_extra_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(demo.EXTRAS, "no_such_module", "no-such-package")
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "shmx demo: no-such-package not installed: pip install 'torch-shmx[demo]'\n"


@pytest.mark.parametrize(("lost", "wrong", "left"), [(0, 0, []), (1, 0, []), (0, 1, []), (0, 0, ["shmx-name"])])
def test_any_fault_of_shmx_fails_the_run(lost: int, wrong: int, left: list[str]) -> None:
    message = demo_run.Message(0, "shmx", 1.0, 2.0, 3, 4, 5, loads=4, lost=lost, wrong=wrong)
    options = demo.parse(["--transports", "shmx"])
    result = demo.summarize(options, demo_run.Ready(1, 1), [message], {"shmx": left})
    assert result["ok"] == (not lost and not wrong and not left)


def test_checksum_tells_changed_moved_and_reshaped_bytes() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    changed = tensor.clone()
    changed[2, 3] += 1
    others = [changed, tensor.flip(0), tensor.view(4, 3), tensor.view(torch.int32)]
    assert demo_run.checksum(tensor) == demo_run.checksum(tensor.clone())
    assert len({demo_run.checksum(other) for other in [tensor, *others]}) == 5


# ---- images ----


def test_photographs_make_32_different_images_of_180_mib(photographs: list[Image.Image]) -> None:
    patched = [images.patch_image(photograph) for photograph in photographs]
    assert len(patched) == 32
    assert len({zlib.crc32(image.pixel_values.numpy().data) for image in patched}) == 32
    assert len({tuple(image.image_grid_thw[0].tolist()) for image in patched}) > 8
    assert 175 < sum(image.pixel_values.nbytes for image in patched) / (1 << 20) < 190


def test_shapes_follow_the_size_of_the_image(photographs: list[Image.Image]) -> None:
    for photograph in photographs:
        patched = images.patch_image(photograph)
        height, width = images.smart_resize(photograph.height, photograph.width)
        assert patched.image_grid_thw.dtype == torch.int64
        assert patched.image_grid_thw.tolist() == [[1, height // 14, width // 14]]
        assert patched.pixel_values.dtype == torch.float32
        assert patched.pixel_values.is_contiguous()
        assert patched.pixel_values.shape == ((height // 14) * (width // 14), 3 * 2 * 14 * 14)


def test_photographs_are_the_same_every_time(photographs: list[Image.Image]) -> None:
    again = images.load_photographs()
    assert [image.tobytes() for image in again] == [image.tobytes() for image in photographs]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (28, 28, (56, 56)),  # grown to the least area
        (512, 512, (504, 504)),  # rounded to multiples of 28
        (720, 1280, (728, 1288)),
        (3000, 4000, (840, 1148)),  # shrunk to the greatest area
        (10, 2000, (28, 812)),
        (1, 1, (56, 56)),
    ],
)
def test_smart_resize_keeps_the_area_within_bounds(height: int, width: int, expected: tuple[int, int]) -> None:
    assert images.smart_resize(height, width) == expected
    assert images.MIN_PIXELS <= expected[0] * expected[1] <= images.MAX_PIXELS


@pytest.mark.parametrize(("height", "width"), [(10, 2001), (2001, 10)])
def test_smart_resize_refuses_slivers(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="at most 200 times"):
        images.smart_resize(height, width)


def test_patches_come_in_the_order_of_qwen2_vl() -> None:
    # Red is the column, green the row, blue constant; 56 x 84 needs no resizing.
    height, width = 56, 84
    picture = Image.new("RGB", (width, height))
    picture.putdata([(x, y, 255) for y in range(height) for x in range(width)])
    patched = images.patch_image(picture)
    assert patched.image_grid_thw.tolist() == [[1, 4, 6]]

    # Patches that merge into one token are neighbours: two by two, then on to the right.
    corners = [(0, 0), (0, 14), (14, 0), (14, 14), (0, 28), (0, 42), (14, 28), (14, 42)]
    mean, std = torch.tensor(images.CLIP_MEAN), torch.tensor(images.CLIP_STD)
    columns = patched.pixel_values.view(24, 3, 2, 14, 14)
    for row, (top, left) in enumerate(corners):
        for channel, corner in ((0, left), (1, top)):
            for frame in (0, 1):
                level = columns[row, channel, frame, 3, 5] * std[channel] + mean[channel]
                assert round(level.item() * 255) == corner + (5 if channel == 0 else 3)
    # (0 - 0.48145466) / 0.26862954 and (1 - 0.40821073) / 0.27577711
    torch.testing.assert_close(patched.pixel_values[0, 0].item(), -1.792263, rtol=0, atol=1e-5)
    torch.testing.assert_close(patched.pixel_values[0, -1].item(), 2.145897, rtol=0, atol=1e-5)


def test_directory_is_read_in_the_order_of_the_names(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 60), "red").save(tmp_path / "b.png")
    Image.new("RGB", (40, 60), "blue").save(tmp_path / "a.JPG")
    Image.new("L", (40, 60), 255).save(tmp_path / "c.webp")
    (tmp_path / "d.txt").write_text("no image")
    loaded = images.load_directory(tmp_path)
    assert [image.mode for image in loaded] == ["RGB"] * 3
    assert [int(np.asarray(image)[5, 5].argmax()) for image in loaded] == [2, 0, 0]


def test_image_that_is_too_narrow_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (2, 401)).save(tmp_path / "sliver.png")
    with pytest.raises(images.ImageSourceError, match=r"sliver\.png.*at most 200 times"):
        images.load_directory(tmp_path)


# ---- the opponent ----


def test_reference_loses_the_rank_that_loads_after_the_first_materialize(prefix: str) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    blob = pickle.dumps(reference_segment.SegmentTensor(tensor, name=f"{prefix}0"))
    first, second = pickle.loads(blob), pickle.loads(blob)
    assert torch.equal(first.materialize(), tensor)
    # Opened in time: the mapping outlives the name.
    assert torch.equal(second.materialize(), tensor)
    with pytest.raises(FileNotFoundError):
        pickle.loads(blob)


def test_reference_segments_that_nobody_materialized_are_found_and_removed(prefix: str) -> None:
    for number in range(2):
        reference_segment.SegmentTensor(torch.zeros(0 if number else 4), name=f"{prefix}{number}")
    assert reference_segment.remove_left(prefix) == [f"{prefix}0", f"{prefix}1"]
    assert reference_segment.remove_left(prefix) == []
