"""Reads and writes files and folders, with errors that name them.

Content is written beside its final place, flushed to the disk and renamed. A reader finds the old content or the new
content, never a part. Reading runs no code and never blocks: anything but a regular file is refused.
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
_CHECKED = 2**20  # elements at a time
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def check_file(path: Path) -> None:
    """Raise a `ValueError` that names `path` unless it is a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name that is too long
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, but must be a file")


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises a `ValueError` that names the file if it is missing or cannot be read."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark. Raises a `ValueError` that names any other file."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a `ValueError` that names the file if it is missing or contains no object."""
    try:
        content = json.loads(read_text(path), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{path} is damaged: its JSON is nested too deeply") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object, not {type(content).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Later changes of the file do not change them.

    Raises:
        ValueError: the file is missing or damaged, or contains NaN or infinite numbers; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path)
    try:
        # `load_file` maps the file into memory, so its tensors would change with the file.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file ({error})") from None
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a `ValueError` that names `where` and the first tensor that contains NaN or infinite numbers."""
    for name, tensor in tensors.items():
        # In parts, for `isfinite` takes more memory than what it looks at.
        parts = tensor.flatten().split(_CHECKED) if tensor.is_floating_point() else ()
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(f"{where}: tensor {name} contains NaN or infinite numbers. The weights are damaged.")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to. The file becomes `path` when the block ends without an error.

    An earlier file stays until then. Temporary files that killed processes left behind are removed.

    Raises:
        ValueError: the file cannot be written, for instance because the disk is full; the message names `path`.
    """
    path = Path(os.path.realpath(path))  # the target of a link, so that the link stays
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
    """Write a file, as a whole or not at all. Raises a `ValueError` that names the file if that fails."""
    with whole_file(path) as beside, naming(path):
        beside.write_bytes(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, as a whole or not at all. Raises a `ValueError` that names the file if that fails."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of the operating system inside the block into a `ValueError`: `path` cannot be written."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written ({_reason(error)})") from error


@contextmanager
def whole_folder(place: Path, replace: bool = True) -> Iterator[Path]:
    """An empty temporary folder to fill. It becomes `place` when the block ends without an error.

    An earlier folder stays until then. If the system can exchange two folders atomically, `place` always exists.
    Temporary folders that killed processes left behind are removed.

    Args:
        place: the folder to write. Its parents are created.
        replace: whether an existing folder is replaced. If not, the existing folder is kept.

    Raises:
        ValueError: the folder cannot be written, for instance because the disk is full; the message names `place`.
    """
    place = Path(os.path.realpath(place))  # the target of a link, so that the link stays
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
        remove(beside)
        unlock(lock)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_partial(place: Path) -> None:
    """Remove the temporary files and folders of killed processes that were writing `place`.

    Those of running processes stay. The name of `place` may be a pattern such as "*.ckpt".
    """
    for left in place.parent.glob(f".{place.name}.*{_PARTIAL}"):
        try:
            lock = lock_file(left)
        except OSError:  # another process is writing it, or has just removed it
            continue
        if lock is None:  # without locks, it may still be in use
            continue
        remove(left)
        unlock(lock)


def lock_file(path: Path) -> int | None:
    """Lock a file or folder for this process. It stays locked until `unlock` or the end of the process.

    Returns:
        a descriptor for `unlock`; None if the file system has no locks, like some network file systems.

    Raises:
        BlockingIOError: it is locked already.
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
    """Close the locks in a forked process, such as a loader worker. Otherwise they would outlive their own process."""
    while _held:
        os.close(_held.pop())


_held: set[int] = set()
os.register_at_fork(after_in_child=_leave_to_parent)


def _locked_beside(place: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """A new file or folder beside `place`, and its lock."""
    remove_partial(place.with_name(escape(place.name)))
    while True:
        beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}{_PARTIAL}")
        make(beside)
        try:
            lock = lock_file(beside)
        except (BlockingIOError, FileNotFoundError):  # another process found it unlocked and removes it
            continue
        if beside.exists():
            return beside, lock
        unlock(lock)


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders, atomically if the system can do that."""
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """The message of an error without what follows its first line; the name of its class if there is no message."""
    return str(error).partition("\n")[0] or type(error).__name__


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
