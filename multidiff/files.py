"""Files and folders that are whole or absent, and errors that name them.

Everything is written beside its place, flushed to the disk and renamed, so that a reader finds the old content or the
new one. Reading runs no code and never waits: pipes, devices and folders in place of a file are refused.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL = ".partial"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def check_file(path: Path) -> None:
    """Raise a `ValueError` naming `path` unless it is a file that can be read to its end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name that is too long
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{path} is {kind}, but a file is expected there")


def read_bytes(path: Path) -> bytes:
    """The content of a file; `ValueError` naming it where it is missing or cannot be read."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark; `ValueError` naming the file otherwise."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` naming the file where it is missing, damaged or holds something else."""
    try:
        content = json.loads(read_text(path), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be a file of multidiff") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, independent of the file.

    Raises:
        ValueError: the file is missing, damaged, or holds a number that is not finite; names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path)
    try:
        # `load_file` maps the file: a tensor would change when the file does.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file ({error})") from None
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a `ValueError` that names `where` and the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: tensor {name} holds NaN or infinite numbers; the weights are damaged")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the block ends without an error.

    An earlier file stays until that moment. What killed processes left beside it is removed.

    Raises:
        ValueError: the disk is full, the folder is not writable, or the like; names `path`.
    """
    path = Path(os.path.realpath(path))  # where a link points to, so that the link stays
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside, lock = _locked_beside(path, lambda place: place.touch(exist_ok=False))
    try:
        yield beside
        with naming(path):
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)
        unlock(lock)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; `ValueError` naming it where that fails."""
    with whole_file(path) as beside, naming(path):
        beside.write_bytes(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; `ValueError` naming it where that fails."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into a `ValueError` that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written ({_reason(error)})") from error


@contextmanager
def whole_folder(place: Path, replace: bool = True) -> Iterator[Path]:
    """An empty folder to fill, which becomes `place` when the block ends without an error.

    An earlier `place` stays until that moment; where the system can exchange two folders, there is always one. What
    killed processes left beside it is removed.

    Args:
        place: the folder to write; its parents are made.
        replace: whether an earlier folder is replaced; if not, one that appeared meanwhile is kept.

    Raises:
        ValueError: the disk is full, the parent is not writable, or the like; names `place`.
    """
    place = Path(os.path.realpath(place))  # where a link points to, so that the link stays
    with naming(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside, lock = _locked_beside(place, Path.mkdir)
    try:
        yield beside
        with naming(place):
            for path in [*beside.rglob("*"), beside]:
                _sync(path)
            try:
                beside.rename(place)
            except OSError:
                if not place.exists():
                    raise
                if replace:
                    _exchange(beside, place)
            _sync(place.parent)
    finally:
        _remove(beside)
        unlock(lock)


def remove_partial(place: Path) -> None:
    """Remove what killed processes left while they wrote `place`, whose name may be a pattern such as "*.ckpt".

    What running processes still write stays.
    """
    for left in place.parent.glob(f".{place.name}.*{_PARTIAL}"):
        try:
            lock = lock_file(left)
        except OSError:  # somebody works on it, or has just removed it
            continue
        if lock is None:  # nobody can tell whether it is still written
            continue
        _remove(left)
        unlock(lock)


def lock_file(path: Path) -> int | None:
    """Lock a file or folder for this process; `unlock` it with what is returned. The end of the process unlocks it.

    Returns:
        A descriptor, or None where the file system has no locks, as some network file systems have none.

    Raises:
        BlockingIOError: another holder has it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            return None
        raise
    _held.add(descriptor)
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Release a lock that `lock_file` returned."""
    if descriptor is not None:
        _held.discard(descriptor)
        os.close(descriptor)


def _leave_to_parent() -> None:
    """A lock outlives its process in the processes that it forked, such as loader workers, unless these let it go."""
    while _held:
        os.close(_held.pop())


_held: set[int] = set()
os.register_at_fork(after_in_child=_leave_to_parent)


def _locked_beside(place: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """A new file or folder beside `place`, locked as long as it is written."""
    remove_partial(place.with_name(escape(place.name)))
    while True:
        beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}{_PARTIAL}")
        make(beside)
        try:
            lock = lock_file(beside)
        except (BlockingIOError, FileNotFoundError):  # another process takes it for left behind, and removes it
            continue
        if beside.exists():
            return beside, lock
        unlock(lock)


def _remove(path: Path) -> None:
    """Remove a folder, or the file that stood in its place, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`, and `old` in that of `new`, at once where the system can do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        renameat2 = None
    if renameat2 is not None and not renameat2(
        _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), ctypes.c_uint(_RENAME_EXCHANGE)
    ):
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """The message of an error without what follows its first line; the name of its class if there is no message."""
    return str(error).partition("\n")[0] or type(error).__name__


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
