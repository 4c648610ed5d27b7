"""Every damaged or hostile file is one sentence, and quickly: bounds are checked before anything is built."""

import pytest

from keye_jax.errors import UserError
from keye_jax.parsing import MAX_BYTES, MAX_DEPTH, MAX_YAML_BYTES, parse_json, read_json, read_yaml


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b'{"a": "\\', "is not JSON"),
        (b'"' + b'\\"' * 100_000, "is not JSON"),
        (b"[" * 100_000, "100,000 levels deep; at most 100 are allowed"),
        (b'{"a":' * 100_000, "100,000 levels deep"),
        (b'{"a": ' + b"7" * 5000 + b"}", "a number has 5,000 digits"),
        (b'{"a": 0.' + b"7" * 5000 + b"}", "is not finite, or too long"),
        (b'{"a": 1e400}', "the number 1e400 is not finite"),
        (b'{"a": [NaN]}', "the number NaN is not finite"),
        (b'{"a": -Infinity}', "the number -Infinity is not finite"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands twice in one object"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "begins with a byte order mark"),
        ('{"ä": 1}'.encode("latin-1"), "must be in UTF-8"),
        (b"[1]", r"holds \[1\]; it must be a JSON object"),
        (b"3", "holds 3; it must be a JSON object"),
        (b" " * (MAX_BYTES + 1), "has more than 16,777,216 bytes"),
    ],
    ids=range(18),
)
def test_json_that_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"config.json .*{message}") as error:
        read_json(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_json_within_the_bounds():
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(b'{"a": "[[[[\\"[[", "b": 1000000000000000019884624838656}', "it")["b"] > 10**30
    assert parse_json(deep, "it") == parse_json(b" " + deep, "it")
    with pytest.raises(UserError, match="it has lists or objects 101 levels deep"):
        parse_json(b"[" + deep + b"]", "it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("a: \x07", "is not YAML"),
        ('a: "\\UFFFFFFFF"', "is not YAML"),
        ("a: 2020-13-45", "is not YAML"),
        ("a: 0b_", "is not YAML"),
        ("[a]: 1\n{}: 2", "is not YAML"),
        ("a: 1\n---\na: 2", "is not YAML"),
        ("=: 1", "is not YAML"),
        ("[" * 100_000, "101 levels deep"),
        ("- " * 100_000, "101 levels deep"),
        ("a: &x [1]\nb: 2", "has an anchor or an alias in line 1"),
        ("a: 1\nb: *x", "has an anchor or an alias in line 2"),
        ("a: !!python/object/apply:os.getcwd []", "has the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'"),
        ("a: !!int 3", "has the tag"),
        ("a: " + "7" * 5000, "a number has 5,000 digits"),
        ("a: 1" + ":1" * 5000, "a number has 10,001 digits"),
        ("a: .inf", "the number .inf is not finite"),
        ("a: .nan", "the number .nan is not finite"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("\ufeffa: 1", "begins with a byte order mark"),
        ("#" * (MAX_YAML_BYTES + 1), "has more than 262,144 bytes"),
    ],
    ids=range(21),
)
def test_yaml_that_is_refused(tmp_path, content, message):
    path = tmp_path / "mesh.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"mesh.yaml .*{message}") as error:
        read_yaml(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_yaml_of_another_encoding(tmp_path):
    (tmp_path / "mesh.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match="must be in UTF-8"):
        read_yaml(tmp_path / "mesh.yaml")
