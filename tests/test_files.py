"""Files that are whole or absent: errors that name them, litter of killed processes, exchange without a gap."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from multidiff import files


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("folder", "pipe", "loop", "absent", "x" * 300):
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            files.read_json(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/zero is a pipe or a device"):
        files.read_bytes(files.Path("/dev/zero"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": NaN}',
        b'{"a": 1' + b"0" * 9000 + b"}",
        b"\x00" * 9,
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_json(tmp_path / "a.json") == {}


def test_tensors_that_are_not_finite_or_whole_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(3), "index": torch.arange(3)}, path)
    assert torch.equal(files.read_tensors(path)["weight"], torch.ones(3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated"):
        files.read_tensors(path)
    save_file({"weight": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(ValueError, match=r"a\.safetensors: tensor weight contains NaN"):
        files.read_tensors(path)


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match=r"/dev/null/a cannot be written"):
        files.write_bytes(files.Path("/dev/null/a"), b"")
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_a_sentence(tmp_path):
    with (
        pytest.raises(ValueError, match=r"x cannot be written \(No space left on device\)"),
        files.naming(tmp_path / "x"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_a_folder_appears_whole_and_an_error_leaves_the_old_one(tmp_path):
    place = tmp_path / "model"
    with files.whole_folder(place) as folder:
        (folder / "a").write_text("1")
        assert not place.exists()
    with pytest.raises(ZeroDivisionError), files.whole_folder(place) as folder:
        (folder / "a").write_text(str(1 / 0))
    assert (place / "a").read_text() == "1"
    with files.whole_folder(place, replace=False) as folder:
        (folder / "a").write_text("3")
    assert (place / "a").read_text() == "1"
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with files.whole_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a").read_text() == "1"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_reader_always_finds_a_folder(tmp_path, monkeypatch, exchange):
    """Without the system's exchange there is a gap, but never half a folder."""
    if not exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    place, stop, missing, broken = tmp_path / "model", threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                names = os.listdir(place)
            except FileNotFoundError:
                missing.append(1)
                continue
            if names not in (["a"], []):
                broken.append(names)

    with files.whole_folder(place) as folder:
        (folder / "a").write_text("1")
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        with files.whole_folder(place) as folder:
            (folder / "a").write_text(str(number))
    stop.set()
    reader.join()
    assert (place / "a").read_text() == "99"
    assert not broken
    if exchange:
        assert not missing


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_left_alone(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from multidiff import files\n"
        "with files.whole_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('1'); print('ready', flush=True); time.sleep(60)"
    )
    place = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    files.remove_partial(place)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with files.whole_folder(place):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_lock_is_held_once_and_not_by_forked_children(tmp_path):
    (tmp_path / "lock").touch()
    lock = files.lock_file(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        files.lock_file(tmp_path / "lock")
    processes = multiprocessing.get_context("fork")
    started = processes.Event()
    child = processes.Process(target=lambda: (started.set(), time.sleep(30)))
    child.start()
    started.wait()
    files.unlock(lock)
    files.unlock(files.lock_file(tmp_path / "lock"))
    child.kill()
    child.join()


def test_partial_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".a.ckpt.0123.partial").touch()
    (tmp_path / ".b.ckpt.0123.partial").mkdir()
    with files.whole_file(tmp_path / "c.ckpt") as beside:
        beside.write_text("c")
        files.remove_partial(tmp_path / "*.ckpt")
        assert beside.exists()
    assert [one.name for one in tmp_path.iterdir()] == ["c.ckpt"]
