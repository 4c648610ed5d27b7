"""A small tokenizer, without a model."""

import pytest

from keye_jax.config import KeyeConfig
from keye_jax.processor import Processor
from keye_jax.testing import write_processor_files


@pytest.fixture(scope="package")
def tokenizer_files(tmp_path_factory, golden):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_processor_files(directory, KeyeConfig.from_file(golden / "a"))
    return directory


@pytest.fixture(scope="package")
def processor(tokenizer_files, golden):
    return Processor.from_checkpoint(tokenizer_files, KeyeConfig.from_file(golden / "a"))
