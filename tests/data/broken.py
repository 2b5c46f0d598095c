"""Broken image files for tests: small JPEG and PNG files, and what can happen to them, from one seed."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from image_files import photo


def good_file(kind: str, number: int, side: int = 40) -> bytes:
    """A JPEG (some progressive) or PNG file, of about `side` pixels a side."""
    file = io.BytesIO()
    options = {"progressive": True} if kind == "JPEG" and number % 3 == 0 else {}
    photo(side + number % 7, side - number % 5, number).save(file, kind, **options)
    return file.getvalue()


def mutants(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """(file name, content) of `count` files: each way to break one in turn, one in twelve whole."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        kind = ("JPEG", "PNG")[number // len(WAYS) % 2]
        way = WAYS[number % len(WAYS)]
        content = way(good_file(kind, number), random)
        suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
        if way is whole and number % 5 == 0:  # a wrong extension is nothing bad: the content counts
            suffix = {"jpg": "png", "png": "jpg"}[suffix]
        made.append((f"{number:04d}-{way.__name__}.{suffix}", content))
    return made


def whole(content: bytes, random: np.random.Generator) -> bytes:
    return content


def cut_short(content: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(1, len(content))]


def cut_out(content: bytes, random: np.random.Generator) -> bytes:
    start = int(random.integers(0, len(content)))
    return content[:start] + content[start + int(random.integers(1, 200)) :]


def one_flipped_bit(content: bytes, random: np.random.Generator) -> bytes:
    return _flip(content, random, 1)


def flipped_bits(content: bytes, random: np.random.Generator) -> bytes:
    return _flip(content, random, int(random.integers(2, 60)))


def flipped_in_the_header(content: bytes, random: np.random.Generator) -> bytes:
    return _flip(content[:64], random, 3) + content[64:]


def zeros_inside(content: bytes, random: np.random.Generator) -> bytes:
    start = int(random.integers(0, len(content)))
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


def absurd_header(content: bytes, random: np.random.Generator) -> bytes:
    """The right bytes of a small picture under a header of up to 60,000 × 60,000 pixels, checksum and all."""
    width, height = (int(side) for side in random.integers(1, 60_000, 2))
    return with_size(content, width, height)


def bomb(content: bytes, random: np.random.Generator) -> bytes:
    return with_size(content, 30_000, 30_000)


def empty(content: bytes, random: np.random.Generator) -> bytes:
    return b""


def random_bytes(content: bytes, random: np.random.Generator) -> bytes:
    return random.bytes(int(random.integers(1, 5000)))


def magic_and_random_bytes(content: bytes, random: np.random.Generator) -> bytes:
    return content[: int(random.integers(2, 40))] + random.bytes(2000) + content[-8:]


WAYS = (
    whole,
    cut_short,
    cut_out,
    one_flipped_bit,
    flipped_bits,
    flipped_in_the_header,
    zeros_inside,
    absurd_header,
    bomb,
    empty,
    random_bytes,
    magic_and_random_bytes,
)


def with_size(content: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its header."""
    if content[:2] == b"\xff\xd8":
        position = 2
        while not 0xC0 <= content[position + 1] <= 0xC2:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        size = struct.pack(">HH", height, width)
        return content[: position + 5] + size + content[position + 9 :]
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def _flip(content: bytes, random: np.random.Generator, count: int) -> bytes:
    flipped = bytearray(content)
    for position in random.integers(0, len(content), count):
        flipped[position] ^= 1 << int(random.integers(0, 8))
    return bytes(flipped)
