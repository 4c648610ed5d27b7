"""The memory of a conversion grows with the largest tensor, not with the checkpoint."""

import dataclasses
import json
from pathlib import Path

import pytest

from convert import mapping, synthetic
from keye_jax.config import KeyeConfig
from tests.convert.convert_helpers import FULL_CONFIG, run_python, write

# Converts a small checkpoint, then `source` there and back. Prints by how many bytes each way raised the peak memory.
MEASURED = """
import json, re, sys
from pathlib import Path
from convert import conversion, sinks

# The tensors have a hundredth of their real sizes, and so have the limits.
sinks.LARGE_BYTES //= 100
sinks.GROUP_BYTES //= 100
source, warm_up, directory = map(Path, sys.argv[1:])

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

conversion.convert(warm_up, directory / "a")
conversion.convert(directory / "a", directory / "b")
before = peak()
conversion.convert(source, directory / "orbax")
there = peak() - before
conversion.convert(directory / "orbax", directory / "back")
print(json.dumps([there, peak() - before]))
"""

# Buffers and caches of fixed size do not shrink with the tensors.
MARGIN_BYTES = 45_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_far_below_the_checkpoint(tmp_path):
    full = KeyeConfig.from_file(FULL_CONFIG)
    # The full model at a tenth of its widths: each tensor has a hundredth of its size.
    vision = dataclasses.replace(
        full.vision_config, hidden_size=144, num_attention_heads=2, intermediate_size=430, num_hidden_layers=9
    )
    tokens = {name: 1 for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = dataclasses.replace(
        full,
        **tokens,
        hidden_size=200,
        num_attention_heads=4,
        num_key_value_heads=1,
        moe_intermediate_size=77,
        vocab_size=15194,
        num_hidden_layers=8,
        vision_config=vision,
    )
    sizes = [2 * tensor.size for tensor in mapping.rows(config)]
    synthetic.write_checkpoint(tmp_path / "source", config, shard_size=50_000_000)
    write(tmp_path / "warm_up", layers=1)
    # The C library otherwise keeps freed memory for each thread. At this size that would be most of the peak.
    ran = run_python(MEASURED, tmp_path / "source", tmp_path / "warm_up", tmp_path, MALLOC_ARENA_MAX="2")
    there, back = json.loads(ran.stdout)
    assert max(there, back) <= max(sizes) + MARGIN_BYTES < sum(sizes) / 2
