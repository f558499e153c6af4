"""The wire format of protocol buffers, in which sentencepiece's models are serialized.

The format: https://protobuf.dev/programming-guides/encoding/
"""

import struct
from collections.abc import Iterator


def int_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def float_field(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


def bytes_field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """A number of at least 0 in groups of 7 bits, the lowest first; all bytes but the last have their top bit set."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """The fields of a message in the wire format of protocol buffers.

    Yields:
        The field's number; its value, an int or bytes; and all its bytes.

    Raises:
        ValueError: the message is damaged.
    """
    at = 0
    while at < len(message):
        start = at
        key, at = read_varint(message, at)
        value: int | bytes
        if key & 7 == 0:
            value, at = read_varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(key & 7)
            if key & 7 == 2:
                length, at = read_varint(message, at)
            if length is None or at + length > len(message):
                raise ValueError(f"byte {start} begins no field that fits into the message")
            value, at = message[at : at + length], at + length
        yield key >> 3, value, message[start:at]


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of variable length, and where the next value begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            break
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError(f"byte {at} ends no integer")
