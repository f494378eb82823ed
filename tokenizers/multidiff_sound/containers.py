"""Checks that a sound file is complete, before anything is decoded.

libsndfile decodes a truncated file as a shorter sound. It reads only the first of several chained OGG streams. Of an
MP3 file without a count of frames, it reads as much as the bit rate of the first frame suggests. This module follows
the chunks of a WAV file, the pages of an OGG file and the frames of an MP3 file to their end.

Sources: RFC 3533 (OGG), ISO 11172-3 and 13818-3 (MP3), EBU Tech 3306 (RF64).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import BinaryIO, NamedTuple

from multidiff_sound import flac

_WAVE64 = bytes.fromhex("726966662e91cf11a5d628db04c10000"), bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_CHUNKED = {b"RIFF": "<", b"RF64": "<", b"RIFX": ">", b"FORM": ">"}  # and their byte order
# A program that does not know the size yet writes 0, or a size slightly below one of these: sox and espeak write
# 0x7FFFF000, ALSA 0x7FFFFF00, LAME 0x7FFFFFFF, ffmpeg 0xFFFFFFFF.
_ENDS = (2**31, 2**32, 2**63, 2**64)
_ADVICE = "Copy it again or leave it out."
_CONVERT = "Convert it, for instance with `ffmpeg -i FILE OUT.wav`."
_WINDOW = 2**20  # bytes that are searched for the first frame of an MP3 file
# Bits of a byte in reverse: zlib's CRC-32 takes the lowest bit first, OGG's the highest.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class DamageError(Exception):
    """A file is damaged. The message is the rest of a sentence that begins with the name of the file."""


class Stream(io.RawIOBase):
    """A file for libsndfile: `head`, followed by the bytes of `file` from `start` to `end`."""

    def __init__(self, file: BinaryIO, start: int, end: int, head: bytes = b""):
        self._file, self._head, self._start, self._size = file, head, start, len(head) + end - start
        self._place = 0

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, origin + offset)  # an exception cannot pass through libsndfile
        return self._place

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        content = self._head[self._place : self._place + wanted]
        if not content:
            self._file.seek(self._start + self._place - len(self._head))
            content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def streams_of(file: BinaryIO) -> list[Stream]:
    """The sounds in a file, in order. Each one is complete as far as the file states its length.

    Raises:
        DamageError: the file is truncated, damaged, or of an unsupported format.
    """
    size = file.seek(0, io.SEEK_END)
    start = _after_tags(file, 0)
    magic = _read(file, start, 16)
    if magic[:4] in _CHUNKED and magic[8:12] in (b"WAVE", b"AIFF", b"AIFC"):
        return [_chunks(file, start, size)]
    if magic == _WAVE64[0]:
        return [_wave64(file, start, size)]
    if magic[:4] == b"OggS":
        return _pages(file, start, size)
    if magic[:4] == b"fLaC":
        return [_flac(file, start, size)]
    if start or _Frame.parse(magic):
        return [_frames(file, start, size)]
    raise DamageError(f"is not a WAV, FLAC, OGG or MP3 file. {_CONVERT}")


def _read(file: BinaryIO, place: int, count: int = -1) -> bytes:
    file.seek(place)
    return file.read(count)


def _chunks(file: BinaryIO, start: int, size: int) -> Stream:
    """A WAV or AIFF file: chunks of a name, a size and that number of bytes, padded to an even number."""
    kind, order = _read(file, start, 4), _CHUNKED[_read(file, start, 4)]
    (whole,) = struct.unpack(f"{order}I", file.read(4))
    place, large = start + 12, None
    while True:
        header = _read(file, place, 8)
        if len(header) < 8:
            raise DamageError(f"is truncated before its samples. {_ADVICE}")
        name, (length,) = header[:4], struct.unpack(f"{order}I", header[4:])
        place += 8
        if name in (b"data", b"SSND"):
            break
        if name == bytes(4):
            raise DamageError(f"is damaged: a chunk of zeros begins at byte {place - 8:,}. {_ADVICE}")
        if kind == b"RF64" and name == b"ds64":
            large = struct.unpack("<2Q", file.read(16).ljust(16, b"\0"))
        place += length + length % 2
    if large:
        whole, length = large
    rest = size - place
    # A size of 0 is correct only if more chunks follow, which the size of the whole file then includes.
    empty = length == 0 and (_is_open(whole) or start + 8 + whole <= place)
    wrapped = not large and rest - length >= 2**32  # the size exceeds 32 bits
    if empty or wrapped or (length > rest and _is_open(length)):
        return _closed(file, start, place, size, order)
    if length > rest:
        raise DamageError(f"is truncated after {rest:,} of {length:,} bytes of samples. {_ADVICE}")
    if start + whole > size and not _is_open(whole):  # some programs include the first 8 bytes
        raise DamageError(f"is truncated after its samples. {_ADVICE}")
    return Stream(file, start, size)


def _is_open(length: int) -> bool:
    """Whether a size is a placeholder for an unknown size."""
    return any(end - 4096 <= length < end for end in _ENDS)


def _closed(file: BinaryIO, start: int, place: int, size: int, order: str) -> Stream:
    """The same file with its actual sizes. Its samples begin at `place` and end with the file."""
    if size - place >= 2**32:
        raise DamageError("has 4 GiB of samples or more, and does not state how many. Split it.")
    head = bytearray(_read(file, start, place - start))
    head[:4] = head[:4].replace(b"RF64", b"RIFF")
    head[4:8] = struct.pack(f"{order}I", min(size - start - 8, 2**32 - 1))
    head[-4:] = struct.pack(f"{order}I", size - place)
    return Stream(file, place, size, bytes(head))


def _wave64(file: BinaryIO, start: int, size: int) -> Stream:
    """Sony's Wave64: chunks of a GUID, a size that includes both, and data, padded to a multiple of 8 bytes."""
    place = start + 40
    while True:
        header = _read(file, place, 24)
        if len(header) < 24:
            raise DamageError(f"is truncated before its samples. {_ADVICE}")
        length = max(24, int.from_bytes(header[16:], "little"))
        if header[:16] == _WAVE64[1]:
            break
        place = min(size, place + length + -length % 8)
    if place + length > size:
        raise DamageError(f"is truncated after {size - place - 24:,} of {length - 24:,} bytes of samples. {_ADVICE}")
    return Stream(file, start, size)


def _flac(file: BinaryIO, start: int, size: int) -> Stream:
    """A FLAC file. If it was written to a pipe, its header has no length, but its last frame gives it."""
    header, size = _read(file, start, flac.HEADER), _before_tags(file, size)
    if len(header) < flac.HEADER or flac.states_length(header):
        return Stream(file, start, size)
    begin = max(start + flac.HEADER, size - flac.longest_frame(header))
    samples = flac.samples_before_end(header, _read(file, begin, size - begin))
    if samples is None:
        raise DamageError(f"is truncated within its last frame. {_ADVICE}")
    return Stream(file, start + flac.HEADER, size, flac.with_length(header, samples))


def _pages(file: BinaryIO, start: int, size: int) -> list[Stream]:
    """The links of a chained OGG file. The first and last page of a stream are marked. Each has a number and a CRC."""
    links: list[Stream] = []
    expected: dict[bytes, int] = {}  # the number of the next page of each stream that has not ended
    place = begin = start
    while place < size:
        header = _read(file, place, 27)
        if header[:4] != b"OggS"[: len(header)]:
            break
        lengths = file.read(header[-1]) if len(header) == 27 else b""
        page = header + lengths + file.read(sum(lengths))
        if len(header) < 27 or len(lengths) < header[26] or len(page) < 27 + len(lengths) + sum(lengths):
            raise DamageError(f"is truncated within a page, after {place:,} bytes. {_ADVICE}")
        flags, serial, number = page[5], page[14:18], int.from_bytes(page[18:22], "little")
        if _checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
            raise DamageError(f"is damaged: the page at byte {place:,} does not match its checksum. {_ADVICE}")
        if flags & 2:
            begin = begin if expected else place
            expected[serial] = number
        if expected.get(serial) != number:
            raise DamageError(f"is damaged: pages are missing before byte {place:,}. {_ADVICE}")
        expected[serial] += 1
        place += len(page)
        if flags & 4:
            del expected[serial]
            if not expected:
                links.append(Stream(file, begin, place))
    if expected or not links:
        what = "is truncated" if place >= size else f"is damaged at byte {place:,}"
        raise DamageError(
            f"{what}: the last page of the sound is missing. Copy it again, or repair it with "
            "`ffmpeg -i FILE -c copy REPAIRED`."
        )
    if _occurs(file, b"OggS", _after_tags(file, place)):
        raise DamageError(f"is damaged: there is no page at byte {place:,}, but pages follow. {_ADVICE}")
    return links


def _occurs(file: BinaryIO, word: bytes, place: int) -> bool:
    """Whether a word occurs anywhere after `place`."""
    file.seek(place)
    tail = b""
    while block := file.read(2**20):
        if word in tail + block:
            return True
        tail = block[1 - len(word) :]
    return False


def _checksum(page: bytes) -> int:
    """OGG's CRC-32: polynomial 0x04C11DB7, highest bit first, initial value 0."""
    register = zlib.crc32(page.translate(_REVERSED), 2**32 - 1) ^ (2**32 - 1)
    return int(f"{register:032b}"[::-1], 2)


class _Frame(NamedTuple):
    """The header of a frame of an MP3 file."""

    format: tuple[int, int, bool]  # version, rate, mono; all frames share it
    length: int  # bytes
    side_info_bytes: int  # bytes between the header and the data of Xing and LAME

    @classmethod
    def parse(cls, header: bytes) -> _Frame | None:
        if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:  # 11 bits of sync, layer III
            return None
        version, rate, bitrate = header[1] >> 3 & 3, header[2] >> 2 & 3, header[2] >> 4
        if version == 1 or rate == 3 or bitrate in (0, 15):
            return None
        first, mono = version == 3, header[3] >> 6 == 3
        kilobits = (_KILOBITS_1 if first else _KILOBITS_2)[bitrate - 1]
        hertz = (44_100, 48_000, 32_000)[rate] // {3: 1, 2: 2, 0: 4}[version]
        length = (144_000 if first else 72_000) * kilobits // hertz + (header[2] >> 1 & 1)
        return cls((version, rate, mono), length, {(True, False): 32, (False, True): 9}.get((first, mono), 17))


_KILOBITS_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KILOBITS_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def _frames(file: BinaryIO, tagged: int, size: int) -> Stream:
    """An MP3 file. If it does not state its number of frames, a frame that does is put before the others."""
    start = _first_frame(file, tagged, size)
    if start is None or _read(file, tagged, start - tagged).strip(b"\0"):
        raise DamageError(
            f"is damaged, or not an MP3 file: no frame begins at byte {tagged:,}, after its tags. {_CONVERT}"
        )
    header = _read(file, start, 4)
    first = _Frame.parse(header)
    assert first is not None
    place, count, length = start, 0, 0
    while True:
        following = _read(file, place, 4)
        frame = _Frame.parse(following)
        if frame is not None and frame.format == first.format:
            if place + frame.length > size:
                raise DamageError(f"is truncated within a frame, after {count:,} frames. {_ADVICE}")
            place, count, length = place + frame.length, count + 1, length + frame.length
        elif (behind := _after_tags(file, place)) != place:
            place = behind
        else:
            break
    if 0 < len(following) < 4 and header.startswith(following[:2]):
        raise DamageError(f"is truncated within a frame, after {count:,} frames. {_ADVICE}")
    if size - place > _WINDOW or _first_frame(file, place, size) is not None:
        raise DamageError(f"is damaged, or changes its format, at byte {place:,}. {_ADVICE}")
    info = _Info.parse(_read(file, start, first.length), first)
    count -= info is not None
    # mp3splt includes the frame that states the number.
    miscounted = info is not None and info.frames == count + 1 and info.length == length
    if info and info.frames > count and not miscounted:
        raise DamageError(f"is truncated after {count:,} of {info.frames:,} frames. {_ADVICE}")
    if info and info.frames == count:
        return Stream(file, start, place)
    return Stream(file, start + (first.length if info else 0), place, _info_frame(header, count))


def _first_frame(file: BinaryIO, place: int, size: int) -> int | None:
    """The first place with two frames of one format, or with a frame that ends the file, within `_WINDOW` bytes."""
    for match in re.finditer(rb"\xff[\xe2-\xff]", _read(file, place, _WINDOW)):
        begin = place + match.start()
        frame = _Frame.parse(_read(file, begin, 4))
        if frame is None:
            continue
        following = _Frame.parse(_read(file, begin + frame.length, 4))
        if begin + frame.length == size or (following is not None and following.format == frame.format):
            return begin
    return None


class _Info(NamedTuple):
    """What the first frame of an MP3 file states about the others; 0 if unknown."""

    frames: int
    length: int  # bytes, including this frame

    @classmethod
    def parse(cls, frame: bytes, parsed: _Frame) -> _Info | None:
        xing = frame[4 + parsed.side_info_bytes :]
        if xing[:4] in (b"Xing", b"Info"):
            numbers = [int.from_bytes(xing[place : place + 4], "big") for place in (8, 12)]
            return cls(numbers[0] if xing[7] & 1 else 0, numbers[1] if xing[7] & 3 == 3 else 0)
        if frame[36:40] == b"VBRI":
            return cls(int.from_bytes(frame[50:54], "big"), 0)
        return None


def _info_frame(header: bytes, count: int) -> bytes:
    """A silent frame in the format of `header`, which states that `count` other frames follow."""
    header = bytes([0xFF, header[1] | 1, header[2] & 0x0C | 0xE0, header[3]])  # no checksum, the highest bit rate
    frame = _Frame.parse(header)
    assert frame is not None
    content = header + bytes(frame.side_info_bytes) + b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return content.ljust(frame.length, b"\0")


def _after_tags(file: BinaryIO, place: int) -> int:
    """The first byte behind ID3 and APE tags that begin at `place`."""
    while True:
        head = _read(file, place, 32)
        if head[:3] == b"ID3" and len(head) > 10:
            length = sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            place += 10 + length + (10 if head[5] & 0x10 else 0)
        elif head[:3] == b"TAG":
            place += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            place += 32 + int.from_bytes(head[12:16], "little")
        else:
            return place


def _before_tags(file: BinaryIO, end: int) -> int:
    """The first byte of the ID3v1 and APE tags that end at `end`."""
    while True:
        footer = _read(file, max(0, end - 32), 32)
        if end >= 128 and _read(file, end - 128, 3) == b"TAG":
            end -= 128
        elif footer[:8] == b"APETAGEX" and len(footer) == 32:
            with_header = 32 if footer[23] & 0x80 else 0
            end = max(0, end - int.from_bytes(footer[12:16], "little") - with_header)
        else:
            return end
