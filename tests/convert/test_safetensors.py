"""Our reader and writer agree with the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.reader import DTYPES, INDEX_NAME, HeaderError, SafetensorsSource, read_header
from convert.writer import PlannedTensor, ShardWriter, plan_shards, shard_names
from keye_jax.errors import UserError

RNG = np.random.default_rng(7)


def arrays() -> dict[str, np.ndarray]:
    bits = RNG.integers(0, 2**16, 300, dtype=np.uint16)
    return {
        "bf16": bits[:120].view(ml_dtypes.bfloat16).reshape(2, 3, 20),
        "f16": bits[120:121].view(np.float16),
        "f32": RNG.standard_normal((5, 7)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(1.5, np.float32),
        'a name with "quotes" and ü': np.ones(3, np.float16),
    }


def test_reads_what_the_library_writes(tmp_path):
    expected = arrays()
    safetensors.numpy.save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    assert not source.problems and source.entries.keys() == expected.keys()
    for name, array in expected.items():
        read = source.read(name)
        assert read.dtype == array.dtype and read.shape == array.shape and read.tobytes() == array.tobytes()
    source.close()


def test_library_reads_what_we_write(tmp_path):
    expected = arrays()
    planned = [PlannedTensor(name, array.shape, array.dtype) for name, array in expected.items()]
    writer = ShardWriter(tmp_path, planned, shard_size=300)
    for name in reversed(list(expected)):
        writer.write(name, expected[name])
    assert not list(tmp_path.glob("*.safetensors"))
    writer.finish()
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert opened.get_tensor(name).tobytes() == expected[name].tobytes()
            assert opened.get_tensor(name).dtype == expected[name].dtype


def test_shards_are_filled_in_order():
    planned = [PlannedTensor(str(size), (size,), np.dtype(np.float16)) for size in (40, 40, 100, 10, 30)]
    sizes = [[tensor.nbytes for tensor in shard] for shard in plan_shards(planned, 100)]
    assert sizes == [[80], [80], [200], [20, 60]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(13)[0] == "model-00001-of-00013.safetensors"


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"abc", "truncated"),
        ((1 << 40).to_bytes(8, "little"), "not safetensors"),
        ((100).to_bytes(8, "little") + b"{}", "truncated"),
        (with_header(b"not json"), "not JSON"),
        (with_header(b"\xff\xfe"), "byte order mark"),
        (with_header(b"[" * 100_000), "100,000 levels deep"),
        (with_header(b'{"a": 1, "a": 1}'), "stands twice"),
        (with_header(b'{"a": ' + b"1" * 5000 + b"}"), "5,000 digits"),
        (with_header([1]), "not a JSON object"),
        (with_header({"a": entry(0, 8, [2])}, b"1234"), "truncated"),
        (with_header({"a": entry(0, 8, [2])}, b"123456789"), "1 bytes more"),
        (with_header({"a": entry(0, 8, [3])}, bytes(8)), "has 8 bytes"),
        (with_header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "does not begin"),
        (with_header({"a": entry(4, 8, [1])}, bytes(8)), "does not begin"),
        (with_header({"a": entry(0, 4, [1], "F99")}, bytes(4)), "cannot be read"),
        (with_header({"a": entry(0, 4, [-1])}, bytes(4)), "cannot be read"),
        (with_header({"a": {"dtype": "F32"}}), "cannot be read"),
        (with_header({"a": 3}), "cannot be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=message):
        read_header(path)
    # The library refuses each of them too.
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(path)


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "%s"}}' % ("b" * 300),
    ],
)
def test_bad_index_is_refused(tmp_path, index):
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(UserError, match="weight_map"):
        SafetensorsSource(tmp_path)


def test_dtypes_are_those_of_the_format():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {"BF16": 2, "F32": 4, "F16": 2}
