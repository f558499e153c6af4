"""PyTorch's files of weights: what torch.save writes loads, and anything else is refused before torch sees it."""

import codecs
import io
import os
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from llama.checkpoint.pickled_weights import open_pickled_weights
from llama.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def assert_same_as_torch_load(path):
    ours, theirs = open_pickled_weights(path), torch.load(path, weights_only=True)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)
        assert (ours[name].dtype, ours[name].stride()) == (tensor.dtype, tensor.stride())
        assert not ours[name].requires_grad
    return ours


@st.composite
def weights(draw):
    """A tensor of random size, dtype and strides, perhaps a Parameter or a part of a larger tensor."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    tensor = torch.randn(shape).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if tensor.dim() and tensor.shape[0] > 1 and draw(st.booleans()):
        tensor = tensor[1:]
    return torch.nn.Parameter(tensor) if draw(st.booleans()) else tensor


@given(st.dictionaries(st.text(max_size=5), weights(), max_size=5), st.booleans(), st.booleans())
@examples(300)
def test_whatever_torch_saves_of_a_dictionary_of_tensors(tmp_path_factory, tensors, ordered, shared):
    path = tmp_path_factory.mktemp("weights") / "file.pth"
    if shared and tensors:
        tensors["shared"] = next(iter(tensors.values()))
    torch.save(OrderedDict(tensors) if ordered else tensors, path)
    assert_same_as_torch_load(path)


def test_a_state_dict(tmp_path):
    """It has an attribute with version numbers."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).bfloat16()
    torch.save(network.state_dict(), tmp_path / "file.pth")
    loaded = assert_same_as_torch_load(tmp_path / "file.pth")
    network.load_state_dict(loaded)


def test_more_tensors_than_any_model_has(tmp_path):
    torch.save({f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(1) for i in range(5000)}, tmp_path / "file")
    assert len(open_pickled_weights(tmp_path / "file")) == 5000


def test_tensors_that_share_their_data_share_it_when_loaded(tmp_path):
    weight = torch.randn(4, 3)
    torch.save({"a": weight, "b": weight.t(), "c": weight[1:]}, tmp_path / "file.pth")
    loaded = assert_same_as_torch_load(tmp_path / "file.pth")
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() == loaded["c"].data_ptr() - 12


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Data:
    """Pickled as a reference to the data of a tensor."""

    def __init__(self, key="0", length=4, kind=torch.FloatStorage, name="storage"):
        self.identifier = (name, kind, key, "cpu", length)


def tensor(data=None, offset=0, size=(2, 2), stride=(2, 1), *more):
    return Call(torch._utils._rebuild_tensor_v2, data or Data(), offset, size, stride, False, OrderedDict(), *more)


class Pickler(pickle.Pickler):
    def persistent_id(self, item):
        return item.identifier if isinstance(item, Data) else None


def pickled(content, protocol=2):
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def write_archive(path, instructions, data=b"\0" * 16):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", instructions)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function that writes a pickle, and returns the message with which it is refused before torch loads it."""

    def message(instructions):
        path = write_archive(tmp_path / "file.pth", instructions)
        monkeypatch.setattr("torch.load", lambda *arguments, **options: pytest.fail("torch loaded it"))
        with pytest.raises(CheckpointError, match=r"file\.pth") as error:
            open_pickled_weights(path)
        return str(error.value)

    return message


def test_the_archives_of_these_tests_load_if_nothing_is_wrong(tmp_path):
    path = write_archive(tmp_path / "file.pth", pickled({"a": tensor()}))
    assert torch.equal(open_pickled_weights(path)["a"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (eval, "__builtin__.eval"),
        (getattr, "__builtin__.getattr"),
        (torch.load, "torch.serialization.load"),
        (torch.storage._load_from_bytes, "torch.storage._load_from_bytes"),
        (Counter, "collections.Counter"),
        (bytearray, "__builtin__.bytearray"),
        (codecs.encode, "_codecs.encode"),
        (torch._utils._rebuild_sparse_tensor, "torch._utils._rebuild_sparse_tensor"),
        (torch._utils._rebuild_tensor_v3, "torch._utils._rebuild_tensor_v3"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
    ],
)
def test_other_functions_are_named_and_not_called(refused, function, name):
    for content in ({"a": Call(function, "x")}, {"a": tensor(), "b": Call(function, 1)}, {"a": function}):
        assert f"would call {name} while it is read, which no file of weights needs: refused, not run" in refused(
            pickled(content)
        )


@pytest.mark.parametrize(
    "content",
    [
        [tensor()],
        {"a": [1]},
        {"a": {"b": 1.5}},
        {"a": {1, 2}},
        {3: tensor()},
        {("a", "b"): tensor()},
        {"a": b"bytes"},
    ],
)
def test_something_other_than_named_tensors(refused, content):
    assert "holds something other than named tensors" in refused(pickled(content)) or "would call" in refused(
        pickled(content)
    )


@pytest.mark.parametrize("content", [{"a": 1}, {"a": {"b": tensor()}}, {"a": (tensor(), "x")}, tensor(), None, "x"])
def test_tensors_that_have_no_names(tmp_path, content):
    path = write_archive(tmp_path / "file.pth", pickled(content))
    with pytest.raises(CheckpointError, match=r"file\.pth holds something other than named tensors"):
        open_pickled_weights(path)


HUGE = 2**62
WRONG_SIZES = {
    "data longer than in the file": (tensor(Data(length=5)), "data/0 has 16 bytes, too few for 5 elements"),
    "a negative length": (tensor(Data(length=-1)), "data/0 has 16 bytes, too few for -1 elements"),
    "a huge length": (tensor(Data(length=10**300)), "data/0 has 16 bytes, too few for 1000"),
    "doubles instead of floats": (
        tensor(Data(kind=torch.DoubleStorage)),
        "data/0 has 16 bytes, too few for 4 elements",
    ),
    "data that isn't there": (tensor(Data("1")), "data/1 has no bytes, too few for 4 elements"),
    "a file elsewhere": (tensor(Data("../../x")), "data/../../x has no bytes"),
    "a larger shape": (tensor(size=(5, 1)), r"a tensor of shape (5, 1) in 4 elements"),
    "an offset": (tensor(offset=1), "a tensor of shape (2, 2) in 4 elements"),
    "longer strides": (tensor(stride=(3, 1)), "a tensor of shape (2, 2) in 4 elements"),
    "a huge shape": (tensor(size=(HUGE, 4), stride=(4, 1)), "in 4 elements"),
    "sizes that overflow": (tensor(size=(HUGE, HUGE), stride=(HUGE, HUGE)), "in 4 elements"),
    "many axes": (tensor(size=(1,) * 9, stride=(0,) * 9), "a tensor of 9 axes"),
    "a negative stride": (tensor(stride=(-2, 1)), "not whole numbers of at least 0"),
    "a negative offset": (tensor(offset=-1), "not whole numbers of at least 0"),
    "a huge number": (tensor(size=(2**63, 0)), "not whole numbers of at least 0"),
    "text for a size": (tensor(size=("2", 2)), "not whole numbers of at least 0"),
    "fewer strides": (tensor(stride=(2,)), "zip() argument 2 is shorter"),
    "metadata of a tensor": (tensor(None, 0, (2, 2), (2, 1), {"neg": True}), "a call that torch.save would not write"),
    "no data": (Call(torch._utils._rebuild_tensor_v2, 3, 0, (2, 2), (2, 1), False, OrderedDict()), "would not write"),
    "a dictionary of arguments": (Call(OrderedDict, ("a", "b")), "a call that torch.save would not write"),
    "a parameter of nothing": (Call(torch._utils._rebuild_parameter, "x", True, OrderedDict()), "would not write"),
    "another reference": (tensor(Data(name="module")), "a reference to something other than the data of a tensor"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_SIZES.values(), ids=WRONG_SIZES)
def test_nothing_reaches_beyond_its_data(refused, content, message):
    """The message names the tensor."""
    refusal = refused(pickled({"b": tensor(), "a": content}))
    assert message in refusal
    assert "'a': " in refusal


def test_attributes_of_a_tensor(refused):
    instructions = pickled({"a": tensor()})[:-2] + b"}bs."
    assert "attributes of something other than a dictionary" in refused(instructions)


@pytest.mark.parametrize("protocol", [1, 3, 4])
def test_other_protocols_of_pickles(refused, protocol):
    expected = "holds something other than named tensors" if protocol == 1 else f"is a pickle of protocol {protocol}"
    assert expected in refused(pickled({"a": tensor(), "b": 10**20}, protocol))


def test_a_long_pickle_is_not_read(refused):
    assert "data.pkl has 17000003 bytes, too many for a list of tensors" in refused(START + b"N" * 17_000_000 + b".")


def test_data_used_as_two_kinds(refused):
    content = {"a": tensor(), "b": tensor(Data(length=2, kind=torch.HalfStorage), 0, (2,), (1,))}
    assert "data/0 is used as Storage(length=4" in refused(pickled(content))


@pytest.mark.parametrize("size", [(2**40,), (2**62, 2**62), (2**32, 2**32)])
def test_an_expanded_tensor(tmp_path, size):
    """Its elements are one in the file, and as many as it says once they are copied."""
    path = write_archive(tmp_path / "file.pth", pickled({"a": tensor(size=size, stride=(0,) * len(size))}))
    with pytest.raises(CheckpointError, match=r"a has shape \(1099511627776,\), larger than its data in|is damaged"):
        open_pickled_weights(path)


START = b"\x80\x02"
TUPLES = (
    b")\x85q\0" + b"h\0h\0\x86q\0" * 200
)  # each holds the one before twice: to look at all of them would take 2**200
ABSURD = {
    "many instructions": START + b"(" * 10_000_000 + b".",
    "many dictionaries": START + b"}0" * 5_000_000 + b".",
    "many constants": START + b"N" * 10_000_000 + b".",
    "a huge place in the memo": START + b"}r\xff\xff\xff\xff" + b"h\0.",
    "a huge number": START + b"\x8a\xff" + b"\x7f" * 255 + b".",
    "a longer number": START + b"\x8b\x00\x00\x80\x00" + b"\x7f" * 2**23 + b".",
    "a number in decimal digits": START + b"I" + b"9" * 10_000_000 + b"\n.",
    "a text longer than the file": START + b"X\xff\xff\xff\x7fa.",
    "many axes": pickled({"a": tensor(size=(2**31 - 1,) * 100_000, stride=(0,) * 100_000)}),
    "nested tuples as a name": START + b"}" + TUPLES + b"Ns.",
    "nested tuples as data": START + TUPLES + b"Q.",
    "nested tuples that are called": START + TUPLES + b")R.",
    "nested tuples as arguments": START + b"ctorch._utils\n_rebuild_tensor_v2\n" + TUPLES + b"R.",
    "nothing": b"",
    "no end": START,
    "an empty stack": START + b"R.",
    "no mark": START + b"t.",
    "an unknown instruction": START + b"\xff.",
    "a pickle in memory": START + b"}h\7.",
    "opcodes that call": START + b"(S'x'\nios\nsystem\n.",
}


@pytest.mark.parametrize("instructions", ABSURD.values(), ids=ABSURD)
def test_absurd_pickles_are_refused_quickly(refused, instructions):
    begin = time.process_time()
    refused(instructions)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", ["many dictionaries", "many constants", "a huge place in the memo", "a longer number"])
def test_absurd_pickles_are_refused_with_little_memory(refused, name):
    tracemalloc.start()
    refused(ABSURD[name])
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@given(st.data())
@examples(500)
def test_damaged_instructions(tmp_path_factory, data):
    """With a right checksum, so that they are followed: what passes the check loads, whatever it is."""
    content = {"a": tensor(), "b": Call(torch._utils._rebuild_parameter, tensor(), True, OrderedDict())}
    instructions = bytearray(pickled(OrderedDict(content)))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(instructions) - 1))
        length = data.draw(st.integers(0, 3))
        piece = st.sampled_from(OPCODES) | st.binary(max_size=4) | st.just(bytes(instructions[at : at + 9]))
        instructions[at : at + length] = data.draw(piece)
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    write_archive(path, bytes(instructions))
    try:
        loaded = open_pickled_weights(path)
    except CheckpointError:
        return
    assert all(weight.numel() <= 4 for weight in loaded.values())


@pytest.mark.parametrize("large_record", [False, True])
def test_a_zip_file_with_hundreds_of_thousands_of_entries(tmp_path, large_record):
    """The list of contents of a small file may be long, and each entry takes zipfile half a kilobyte."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *[0] * 7, 1, *[0] * 6) + b"x"
    directory = entry * 400_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0 if large_record else len(directory), 0, 0)
    if large_record:
        large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 0, 0, len(directory), 0)
        end = large + struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1) + end
    (tmp_path / "file.pth").write_bytes(directory + end)
    with zipfile.ZipFile(tmp_path / "file.pth") as archive:
        assert len(archive.namelist()) == 400_000
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"file\.pth .*list of contents is too long for a file of weights"):
        open_pickled_weights(tmp_path / "file.pth")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("end", [b"", b"more", b"PK\6\7" + bytes(16) + b"PK\5\6" + bytes(18)])
def test_what_does_not_end_as_a_zip_file(tmp_path, end):
    path = write_archive(tmp_path / "file.pth", pickled({"a": tensor()}))
    path.write_bytes(path.read_bytes()[:-1] + end)
    with pytest.raises(CheckpointError, match=r"is damaged or cut short: .*it doesn't end as a zip file"):
        open_pickled_weights(path)


def test_a_second_list_of_contents_for_another_reader(tmp_path):
    """Python's reader takes the list before the file's end, torch's the one whose place is written there."""
    hostile = pickled({"a": Call(bytearray, 2**40)})
    harmless = pickled({"a": tensor()})
    hostile += bytes(len(harmless) - len(hostile))
    first, second = (write_archive(tmp_path / "part", content).read_bytes() for content in (hostile, harmless))
    path = tmp_path / "file.pth"
    path.write_bytes(first[:-22] + second)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data.pkl") == harmless
    assert torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") == hostile
    with pytest.raises(CheckpointError, match="its list of contents is not where it is said to be"):
        open_pickled_weights(path)


def test_a_large_record_elsewhere(tmp_path):
    """One that torch would find, while Python takes the one before the file's end."""
    content = write_archive(tmp_path / "part", pickled({"a": tensor()})).read_bytes()
    directory, (length, start) = content[:-22], struct.unpack("<LL", content[-10:-2])
    large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 4, 4, length, start)
    for place in (len(directory), 0, len(directory) - 1, 2**40):
        path = tmp_path / "file.pth"
        path.write_bytes(directory + large + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1) + content[-22:])
        if place == len(directory):
            assert torch.equal(open_pickled_weights(path)["a"], torch.zeros(2, 2))
        else:
            with pytest.raises(CheckpointError, match="its last records don't follow each other"):
                open_pickled_weights(path)


def test_nested_tensors(tmp_path):
    torch.save({"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"would call torch\._utils\._rebuild_nested_tensor while it is read"):
        open_pickled_weights(tmp_path / "file.pth")


def test_two_entries_of_the_same_name(tmp_path):
    """Which of them a reader takes isn't certain, so that the other may be the one that was checked."""
    path = write_archive(tmp_path / "file.pth", pickled({"a": tensor()}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.PKL", pickled({"a": Call(os.system, "true")}))
    with pytest.raises(CheckpointError, match="several entries of the zip file have the same name"):
        open_pickled_weights(path)


def test_older_files(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"If it was saved by a PyTorch older than 1\.6, load it"):
        open_pickled_weights(tmp_path / "file.pth")


def test_a_network_instead_of_its_weights(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"would call torch\.nn\.modules\.linear\.Linear while it is read"):
        open_pickled_weights(tmp_path / "file.pth")
