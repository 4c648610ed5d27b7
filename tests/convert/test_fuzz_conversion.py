"""A few of the faults that `python -m tests.fuzz_conversion` tries."""

import re

import pytest

from tests.convert.convert_helpers import run_python


@pytest.mark.slow
def test_conversions_under_faults():
    program = """
        import sys
        from tests import fuzz_conversion
        sys.exit(fuzz_conversion.main(["--faults", "8", "--seed", "1"]))
    """
    ends = [re.fullmatch(r" +(\d+)  ([\w, ]+): .*", line) for line in run_python(program).stdout.splitlines()]
    found = [(int(end[1]), end[2]) for end in ends if end is not None]
    assert sum(count for count, _ in found) == 8
    assert {"flip", "kill"} <= {fault for _, faults in found for fault in faults.split(", ")}
