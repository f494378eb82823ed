"""The length of a FLAC stream that was written to a pipe, whose header does not state it (RFC 9639)."""

from __future__ import annotations

import re

HEADER = 42  # bytes: the marker, and the block that describes the stream
_UNKNOWN = 2**36 - 1  # the bits of the number of samples


def states_length(header: bytes) -> bool:
    """Whether a header says how many samples there are."""
    return bool(int.from_bytes(header[18:26], "big") & _UNKNOWN)


def with_length(header: bytes, samples: int) -> bytes:
    """A header that states a number of samples."""
    return header[:18] + (int.from_bytes(header[18:26], "big") | samples).to_bytes(8, "big") + header[26:]


def samples_before_end(header: bytes, tail: bytes) -> int | None:
    """The samples of a stream that ends with `tail`; None where that does not end with a whole frame."""
    for match in reversed(list(re.finditer(rb"\xff[\xf8\xf9]", tail))):
        frame = tail[match.start() :]
        numbers = _numbers(frame[:16])
        if numbers is not None and _remainder(frame, 0x8005, 16) == 0:
            number, samples = numbers
            per_frame = 1 if frame[1] & 1 else int.from_bytes(header[8:10], "big")
            return number * per_frame + samples
    return None


def _numbers(frame: bytes) -> tuple[int, int] | None:
    """The number of a frame (or, with blocks of varying size, of its first sample), and how many samples it holds."""
    if len(frame) < 16:
        frame = frame.ljust(16, b"\0")
    size, rate = frame[2] >> 4, frame[2] & 15
    more = 8 - (frame[4] ^ 0xFF).bit_length()  # a number as UTF-8 writes it: so many bytes, or none for one alone
    if more == 1 or more == 8 or size == 0:
        return None
    number = frame[4] & (0x7F >> more)
    place = 5
    for byte in frame[5 : 4 + max(1, more)]:
        number, place = number << 6 | byte & 0x3F, place + 1
    if size in (6, 7):
        samples = int.from_bytes(frame[place : place + size - 5], "big") + 1
        place += size - 5
    else:
        samples = 192 if size == 1 else 576 << (size - 2) if size < 6 else 256 << (size - 8)
    place += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    return None if _remainder(frame[: place + 1], 0x07, 8) else (number, samples)


def _remainder(content: bytes, polynomial: int, bits: int) -> int:
    """CRC of so many bits, the highest first, from 0: 0 for a content that ends with its own."""
    top, mask, register = 1 << (bits - 1), (1 << bits) - 1, 0
    for byte in content:
        register ^= byte << (bits - 8)
        for _ in range(8):
            register = (register << 1 ^ polynomial if register & top else register << 1) & mask
    return register
