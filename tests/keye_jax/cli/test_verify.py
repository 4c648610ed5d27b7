"""The golden models through `keye-jax verify`: the numbers of docs/correctness.md come from here."""

import numpy as np
import pytest

from convert import convert


@pytest.fixture(scope="module", params=["a", "b"])
def model(request, golden, tmp_path_factory):
    """Recorded arrays of a golden model, and the model as safetensors and as Orbax."""
    directory = tmp_path_factory.mktemp(f"golden_{request.param}")
    convert(golden / request.param, directory / "orbax")
    return golden / request.param, directory / "orbax"


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        ("safetensors", 1024),
        ("orbax", 1024),
        *(pytest.param("orbax", chunk, marks=pytest.mark.slow) for chunk in (32, 13)),
    ],
)
def test_everything_agrees_with_the_reference(keye, model, kind, chunk):
    checkpoint = model[kind == "orbax"]
    code, out, err = keye(
        *("verify", "--checkpoint", checkpoint, "--golden", model[0] / "golden.npz", "--prefill-chunk", chunk)
    )
    assert code == 0, out + err
    assert "14 passed, 0 failed (tolerance 0.0005)" in out
    for name in ("text_selected", "text_experts", "mm_selected", "mm_greedy", "mm_positions"):
        line = next(line for line in out.splitlines() if name in line)
        assert "identical" in line


def test_dense_attention_agrees_with_its_own_reference(keye, model):
    code, out, err = keye(
        *("verify", "--checkpoint", model[1], "--golden", model[0] / "golden.npz", "--attention", "dense")
    )
    assert code == 0, out + err
    assert "text_dense_logits" in out
    assert "5 passed, 0 failed" in out


def test_a_float8_indexer_is_held_to_the_selected_sets(keye, model):
    code, out, err = keye(
        *("verify", "--checkpoint", model[0], "--golden", model[0] / "golden.npz"),
        *("--indexer-dtype", "float8_e4m3fn"),
    )
    assert code == 0, out + err
    assert "5 passed, 0 failed" in out
    for name in ("text_selected", "mm_selected"):
        line = next(line for line in out.splitlines() if name in line)
        assert "of the positions in common" in line
    assert "text_logits" in next(line for line in out.splitlines() if line.startswith("not compared with"))


@pytest.mark.parametrize("option", ["--indexer-dtype", "--cache-dtype", "--activation-dtype"])
def test_another_dtype_is_refused(keye, golden, option):
    code, out, err = keye(
        *("verify", "--checkpoint", golden / "a", "--golden", golden / "a" / "golden.npz", option, "int4")
    )
    assert (code, out) == (2, "")
    assert f"{option} is 'int4'; it must be 'float8_e4m3fn' or left out" in err and err.count("\n") == 1


def test_a_float8_cache_is_held_to_how_far_the_model_agrees(keye, golden):
    code, out, err = keye(
        *("verify", "--checkpoint", golden / "a", "--golden", golden / "a" / "golden.npz"),
        *("--cache-dtype", "float8_e4m3fn"),
    )
    assert code == 0, out + err
    assert "6 passed, 0 failed" in out and out.count("agreement") == 4
    assert "text_hidden" in next(line for line in out.splitlines() if line.startswith("not compared with"))


def test_activations_in_float8_are_refused_without_experts_in_fp8(keye, golden):
    code, out, err = keye(
        *("verify", "--checkpoint", golden / "a", "--golden", golden / "a" / "golden.npz"),
        *("--activation-dtype", "float8_e4m3fn"),
    )
    assert (code, out) == (2, "")
    assert "it takes experts in fp8, and this model's are of all bits" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden / "a" / "golden.npz"))


def verify(keye, golden, tmp_path, arrays, *arguments):
    np.savez(tmp_path / "golden.npz", **arrays)
    return keye("verify", "--checkpoint", golden / "a", "--golden", tmp_path / "golden.npz", *arguments)


def test_an_error_beyond_the_tolerance_fails(keye, golden, tmp_path, arrays):
    wrong = {"text_ids": arrays["text_ids"], "text_logits": arrays["text_logits"].copy()}
    wrong["text_logits"][5, 7] += 1e-3
    code, out, _ = verify(keye, golden, tmp_path, wrong)
    assert code == 1
    assert "FAILED" in out
    assert "largest error 1.0" in out
    code, _, _ = verify(keye, golden, tmp_path, wrong, "--atol", "2e-3")
    assert code == 0


def test_one_wrong_position_in_a_selected_set_fails(keye, golden, tmp_path, arrays):
    wrong = {"text_ids": arrays["text_ids"], "text_selected": arrays["text_selected"].copy()}
    row = wrong["text_selected"][0, -1]
    row[np.argmax(row)], row[np.argmin(row)] = False, True
    code, out, _ = verify(keye, golden, tmp_path, wrong)
    assert code == 1
    assert "2 entries differ" in out


def test_a_nan_is_not_within_any_tolerance(keye, golden, tmp_path, arrays):
    wrong = {"text_ids": arrays["text_ids"], "text_logits": np.full_like(arrays["text_logits"], np.nan)}
    code, _, _ = verify(keye, golden, tmp_path, wrong, "--atol", "inf")
    assert code == 1


def test_absent_arrays_are_skipped_and_said_so(keye, golden, tmp_path, arrays):
    few = {name: arrays[name] for name in ("text_ids", "text_logits", "text_dense_logits")}
    code, out, _ = verify(keye, golden, tmp_path, few)
    assert code == 0
    assert "1 passed" in out
    skipped = next(line for line in out.splitlines() if line.startswith("not in the file, skipped:"))
    assert "mm_logits" in skipped
    assert "not compared with sparse attention: text_dense_logits" in out


@pytest.mark.parametrize(
    ("name", "content"), [("missing.npz", None), ("broken.npz", b"not a zip file"), ("empty.npz", b"")]
)
def test_a_bad_file_of_arrays_is_refused(keye, golden, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = keye("verify", "--checkpoint", golden / "a", "--golden", tmp_path / name)
    assert (code, out) == (2, "")
    assert name in err and err.count("\n") == 1


def test_arrays_of_another_model_are_refused(keye, golden):
    code, _, err = keye("verify", "--checkpoint", golden / "a", "--golden", golden / "b" / "golden.npz")
    assert code == 2
    assert "text_hidden has shape (4, 96, 96); this checkpoint gives (3, 96, 64)" in err
