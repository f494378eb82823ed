"""Finds the length of a FLAC stream that was written to a pipe and does not state it in its header (RFC 9639)."""

from __future__ import annotations

import re

import numpy as np

HEADER = 42  # bytes of the marker and of the block that describes the stream
_UNKNOWN = 2**36 - 1  # the bits of the number of samples
_PERIOD = 2**15 - 1  # period of x^e modulo the polynomial of the frames' CRC


def states_length(header: bytes) -> bool:
    """Whether a header states the number of samples."""
    return bool(int.from_bytes(header[18:26], "big") & _UNKNOWN)


def with_length(header: bytes, samples: int) -> bytes:
    """The header with this number of samples."""
    return header[:18] + (int.from_bytes(header[18:26], "big") | samples).to_bytes(8, "big") + header[26:]


def longest_frame(header: bytes) -> int:
    """An upper bound for the bytes of a frame: the header's, or that of the longest block with 32-bit samples."""
    channels = (header[20] >> 1 & 7) + 1
    return int.from_bytes(header[15:18], "big") or 4 * channels * int.from_bytes(header[10:12], "big") + 2**12


def samples_before_end(header: bytes, tail: bytes) -> int | None:
    """The number of samples of a stream that ends with `tail`; None if it does not end with a whole frame."""
    remainders = _remainders(tail)
    for match in reversed(list(re.finditer(rb"\xff[\xf8\xf9]", tail))):
        if remainders[match.start()]:
            continue
        frame = tail[match.start() : match.start() + 16]
        if (numbers := _numbers(frame)) is not None:
            number, samples = numbers
            per_frame = 1 if frame[1] & 1 else int.from_bytes(header[8:10], "big")
            return number * per_frame + samples
    return None


def _numbers(frame: bytes) -> tuple[int, int] | None:
    """The number of a frame (with blocks of varying size, of its first sample), and its number of samples."""
    if len(frame) < 16:
        frame = frame.ljust(16, b"\0")
    size, rate = frame[2] >> 4, frame[2] & 15
    more = 8 - (frame[4] ^ 0xFF).bit_length()  # coded like UTF-8: the number of bytes, or 0 for one byte
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
    return None if _header_checksum(frame[: place + 1]) else (number, samples)


def _header_checksum(content: bytes) -> int:
    """CRC-8 with the polynomial x⁸ + x² + x + 1. It is 0 for a content that ends with its own CRC."""
    register = 0
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = (register << 1 ^ 0x107 if register & 0x80 else register << 1) & 0xFF
    return register


def _remainders(content: bytes) -> np.ndarray:
    """For each byte, the content from there to the end, modulo x¹⁶ + x¹⁵ + x² + 1.

    The remainder is 0 if that part ends with its own CRC-16. It is the sum of x^e modulo the polynomial over the bits
    that are 1, where e is the number of bits that follow. Addition is XOR, so one pass from the end gives all sums.
    """
    powers = np.empty(_PERIOD, np.uint16)
    power = 1
    for exponent in range(_PERIOD):
        powers[exponent] = power
        power = power << 1 ^ (0x18005 if power & 0x8000 else 0)
    backwards = np.frombuffer(content, np.uint8)[::-1]
    exponents = 8 * np.arange(len(content))
    terms = np.zeros(len(content), np.uint16)
    for bit in range(8):
        terms ^= np.where(backwards >> bit & 1, powers[(exponents + bit) % _PERIOD], 0).astype(np.uint16)
    return np.bitwise_xor.accumulate(terms)[::-1]
