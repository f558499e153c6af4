"""Reading GGUF files: as the `gguf` package reads them, in a fraction of the time; damaged ones are refused at once."""

import mmap
import os
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from conftest import examples, tiny_model, write_gguf
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

from llama.errors import CheckpointError
from llama.gguf_file import MAX_METADATA, MAX_VALUES, GGUFFile

UINT8, UINT16, UINT32, BOOL, STRING, ARRAY, UINT64 = 0, 2, 4, 7, 8, 9, 10
F32, Q4_0 = 0, 2


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str = "t", shape=(32,), kind: int = F32, offset: int = 0, n_axes: int | None = None) -> bytes:
    n_axes = len(shape) if n_axes is None else n_axes
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", n_axes, *shape, kind, offset)


def gguf_bytes(pairs=(), tensors=(), n_pairs=None, n_tensors=None, version=3, data=bytes(128)) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


@pytest.fixture
def open_bytes(tmp_path):
    def open_bytes(content: bytes) -> GGUFFile:
        (tmp_path / "model.gguf").write_bytes(content)
        return GGUFFile(tmp_path / "model.gguf")

    return open_bytes


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value(open_bytes, version):
    numbers = {"B": (0, 255), "b": (1, -128), "H": (2, 65535), "h": (3, -5), "I": (4, 2**32 - 1), "i": (5, -9)}
    numbers |= {"f": (6, 0.5), "?": (7, True), "Q": (10, 2**64 - 1), "q": (11, -(2**63)), "d": (12, 1e300)}
    pairs, expected = [], {}
    for code, (kind, value) in numbers.items():
        items = [value, type(value)(0)]
        pairs.append(pair(code, kind, struct.pack(f"<{code}", value)))
        pairs.append(pair(f"array of {code}", ARRAY, array(kind, 2, struct.pack(f"<2{code}", *items))))
        expected |= {code: value, f"array of {code}": items}
    pairs += [
        pair("text", STRING, text("é🙂")),
        pair("texts", ARRAY, array(STRING, 3, text("") + text("a") + text("ß"))),
    ]
    pairs.append(pair("none", ARRAY, array(STRING, 0)))
    file = open_bytes(gguf_bytes(pairs, version=version))
    assert file.values == expected | {"text": "é🙂", "texts": ["", "a", "ß"], "none": []}
    assert {key: type(value) for key, value in file.values.items()} == {
        key: type(value) for key, value in (expected | {"text": "", "texts": [], "none": []}).items()
    }
    assert file.get("texts", list) == ["", "a", "ß"]
    with pytest.raises(CheckpointError, match=r"model\.gguf: text is 'é🙂', not of type int"):
        file.get("text", int)


integers = st.integers(-(2**31), 2**31 - 1)
floats = st.floats(width=32, allow_nan=False)
names = st.text(min_size=1, max_size=9).filter(lambda name: not name.startswith(("general.", "GGUF.")))
values = st.one_of(
    st.booleans(),
    integers,
    floats,
    st.text(),
    *(st.lists(items, min_size=1) for items in (integers, floats, st.text())),
)


@examples(300)
@given(st.dictionaries(names, values), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), max_size=4))
def test_as_the_gguf_package_reads_it(tmp_path_factory, values, shapes):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add = {int: writer.add_int32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add[bool] = writer.add_bool
    for key, value in values.items():
        if value != "":  # the writer leaves out empty strings
            add[type(value)](key, value)
    generator = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        kind = list(GGMLQuantizationType)[generator.integers(len(GGMLQuantizationType))]
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        plain = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
        plain |= {f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
        if kind.name in plain:
            writer.add_tensor(str(i), generator.standard_normal(shape).astype(plain[kind.name]))
        else:
            shape[-1] *= block_bytes
            writer.add_tensor(str(i), generator.integers(0, 256, shape, dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.GGUFReader(path)
    file = GGUFFile(path)
    fields = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert file.values == fields
    assert list(file.tensors) == [tensor.name for tensor in expected.tensors]
    for theirs in expected.tensors:
        ours = file.tensors[theirs.name]
        assert (ours.shape, ours.kind) == (tuple(theirs.shape.tolist()), theirs.tensor_type)
        assert (ours.data.shape, ours.data.dtype) == (theirs.data.shape, theirs.data.dtype)
        assert ours.data.tobytes() == theirs.data.tobytes()


DAMAGED = {
    "version 1": (gguf_bytes(version=1), "GGUF version 1 is not supported"),
    "version 4": (gguf_bytes(version=4), "GGUF version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"GGUF version 3 \(big-endian\) is not supported"),
    "no version": (b"GGUF\x03", "is damaged or cut short"),
    "no counts": (b"GGUF\x03\x00\x00\x00", "1 values are said to follow byte 8, where 0 bytes"),
    "2**60 values": (gguf_bytes(n_pairs=2**60), f"{2**60} values are said to follow byte 24"),
    "2**60 tensors": (gguf_bytes(n_tensors=2**60), f"{2**60} values are said to follow byte 24"),
    "a key of 2**60 bytes": (gguf_bytes([struct.pack("<Q", 2**60)]), "the string at byte 24 is longer than the file"),
    "2**60 strings": (gguf_bytes([pair("a", ARRAY, array(STRING, 2**60))]), f"{2**60} values are said to follow"),
    "2**60 numbers": (gguf_bytes([pair("a", ARRAY, array(UINT8, 2**60))]), f"{2**60} values are said to follow"),
    "a string of 2**64 - 1": (gguf_bytes([pair("a", STRING, b"\xff" * 8)]), "the string at byte 37 is longer"),
    "nothing after the first of two strings": (
        gguf_bytes([pair("a", ARRAY, array(STRING, 2, text("12345678")))], data=b"").rstrip(b"\0"),
        r"the string at byte 65 is longer than the file: 0 bytes",
    ),
    "an unknown type": (gguf_bytes([pair("a", 13, bytes(8))]), "13 is not a valid GGUFValueType"),
    "an unknown type of items": (gguf_bytes([pair("a", ARRAY, array(99, 1))]), "99 is not a valid GGUFValueType"),
    "an array of arrays": (gguf_bytes([pair("a", ARRAY, array(ARRAY, 1))]), "'a' is an array of arrays"),
    "a key twice": (gguf_bytes([pair("a", UINT8, b"\1")] * 2), "the key 'a' is there twice"),
    "a key that is not UTF-8": (gguf_bytes([text(b"\xff") + bytes(5)]), "utf-8"),
    "a value that is not UTF-8": (gguf_bytes([pair("a", STRING, text(b"\xc3"))]), "utf-8"),
    "an item that is not UTF-8": (gguf_bytes([pair("a", ARRAY, array(STRING, 1, text(b"\xe2\x82")))]), "utf-8"),
    "an alignment of 0": (gguf_bytes([pair("general.alignment", UINT32, bytes(4))]), "general.alignment is 0, not a"),
    "an alignment of 24": (gguf_bytes([pair("general.alignment", UINT32, b"\x18\0\0\0")]), "alignment is 24, not a"),
    "an alignment of 4": (gguf_bytes([pair("general.alignment", UINT32, b"\4\0\0\0")]), "alignment is 4, not a"),
    "an alignment of 2**31": (gguf_bytes([pair("general.alignment", UINT32, b"\0\0\0\x80")]), "not a power of two"),
    "a text as alignment": (gguf_bytes([pair("general.alignment", STRING, text("x"))]), "general.alignment is 'x'"),
    "true as alignment": (gguf_bytes([pair("general.alignment", BOOL, b"\1")]), "general.alignment is True"),
    "a tensor twice": (gguf_bytes(tensors=[tensor(), tensor()]), "the tensor 't' is there twice"),
    "no axes": (gguf_bytes(tensors=[tensor(shape=())]), "the tensor 't' has 0 axes"),
    "five axes": (gguf_bytes(tensors=[tensor(shape=(1, 1, 1, 1, 1))]), "the tensor 't' has 5 axes"),
    "2**31 axes": (gguf_bytes(tensors=[tensor(n_axes=2**31)]), f"the tensor 't' has {2**31} axes"),
    "an empty axis": (gguf_bytes(tensors=[tensor(shape=(32, 0))]), "none may be empty"),
    "an unknown kind": (gguf_bytes(tensors=[tensor(kind=4)]), "the tensor 't' of shape .* 4 is not a valid"),
    "half a block": (gguf_bytes(tensors=[tensor(shape=(48, 2), kind=Q4_0)]), "Q4_0 takes rows of whole blocks of 32"),
    "a misaligned tensor": (gguf_bytes(tensors=[tensor(shape=(1,), offset=4)]), "at byte 4, not a multiple of 32"),
    "a tensor beyond the end": (gguf_bytes(tensors=[tensor(shape=(33,))]), "its 132 bytes from byte 64 exceed the 192"),
    "an offset beyond the end": (gguf_bytes(tensors=[tensor(offset=2**63)]), "exceed the ... of the file"),
    "2**62 features": (gguf_bytes(tensors=[tensor(shape=(2**62,))]), "exceed the ... of the file"),
    "2**256 features": (gguf_bytes(tensors=[tensor(shape=(2**64 - 1,) * 4)]), "exceed the ... of the file"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(open_bytes, content, message):
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as error:
        open_bytes(content)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert "model.gguf" in str(error.value)


def test_the_intact_files_of_these_tests_are_read(open_bytes):
    """So each damage above is the only one."""
    file = open_bytes(gguf_bytes([pair("a", UINT8, b"\1"), pair("b", STRING, text("c"))], [tensor(shape=(16, 2))]))
    assert file.values == {"a": 1, "b": "c"}
    assert (file.tensors["t"].shape, file.tensors["t"].data.shape) == ((16, 2), (2, 16))
    assert open_bytes(gguf_bytes(tensors=[tensor(shape=(1,), offset=32)])).tensors["t"].data.shape == (1,)


@examples(1000)
@given(st.data())
def test_any_damage_is_read_or_refused(tmp_path_factory, data):
    pairs = [
        pair("a", ARRAY, array(STRING, 3, text("one") + text("two") + text("é"))),
        pair("b", ARRAY, array(6, 3, struct.pack("<3f", 1, 2, 3))),
        pair("c", STRING, text("text")),
        pair("d", UINT64, struct.pack("<Q", 7)),
    ]
    content = bytearray(gguf_bytes(pairs, [tensor(shape=(8, 2)), tensor("u", (32,), Q4_0, offset=64)]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, len(content)))
        damage = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\0\0\0\x80", struct.pack("<Q", 2**60), b"\1"]))
        content[at : at + len(damage)] = damage
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(at, len(content))) :]
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    path.write_bytes(content)
    try:
        GGUFFile(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - that it is raised isn't what is tested


def test_the_size_of_metadata_is_limited(tmp_path):
    """This file is sparse, so it takes no space, and would make 16 million empty strings."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([pair("a", ARRAY, array(STRING, 2**24))], data=b""))
    os.truncate(path, 2**28)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=rf"{2**24} values are said .* \(metadata may take {MAX_METADATA}\)"):
        GGUFFile(path)
    assert time.process_time() - begin < 1


def test_the_number_of_values_is_limited(open_bytes):
    """A byte of the file may take 36 of memory."""
    half = array(UINT16, MAX_VALUES // 2, b"\xff\xff" * (MAX_VALUES // 2))
    content = gguf_bytes([pair("a", ARRAY, half), pair("b", ARRAY, half)])
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=rf"model\.gguf .*its metadata have over {MAX_VALUES} values"):
        open_bytes(content)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_the_data_are_mapped_not_copied(tmp_path, monkeypatch):
    """Copy-on-write, so that torch takes the arrays as they are; read-only where the system refuses that."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model())
    before = path.read_bytes()
    data = GGUFFile(path).tensors["output_norm.weight"].data
    assert data.flags.writeable
    assert not data.flags.owndata
    data[:] = 0  # changes the mapping only
    assert path.read_bytes() == before

    map_file = mmap.mmap

    def refuse_copies(*args, access):
        if access == mmap.ACCESS_COPY:
            raise OSError(12, "Cannot allocate memory")
        return map_file(*args, access=access)

    monkeypatch.setattr(mmap, "mmap", refuse_copies)
    read_only = GGUFFile(path).tensors["output_norm.weight"].data
    assert not read_only.flags.writeable
    assert np.array_equal(read_only, GGUFFile(path).tensors["output_norm.weight"].data)

    monkeypatch.setattr(mmap, "mmap", lambda *args, access: refuse_copies(access=mmap.ACCESS_COPY))
    with pytest.raises(MemoryError, match="larger than what this system lets a program map"):
        GGUFFile(path)


def test_a_vocabulary_of_llama3s_size_opens_in_well_under_a_second(open_bytes):
    tokens = b"".join(text(f"token {i}") for i in range(128256))
    merges = b"".join(text(f"left{i % 999} {i}") for i in range(280147))
    pairs = [
        pair("tokenizer.ggml.tokens", ARRAY, array(STRING, 128256, tokens)),
        pair("tokenizer.ggml.token_type", ARRAY, array(GGUFValueType.INT32, 128256, b"\1\0\0\0" * 128256)),
        pair("tokenizer.ggml.merges", ARRAY, array(STRING, 280147, merges)),
    ]
    content = gguf_bytes(pairs)
    begin = time.process_time()
    file = open_bytes(content)
    assert time.process_time() - begin < 1
    assert file.get("tokenizer.ggml.merges", list)[280146] == "left426 280146"
    assert file.get("tokenizer.ggml.token_type", list) == [1] * 128256
