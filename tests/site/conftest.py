"""Tiny models, made once a session."""

import gc
from pathlib import Path

import pytest
import torch

from tests.site import tiny

gc.freeze()  # a Trainer collects garbage whenever it runs: over all that transformers holds, half a second each time
torch.set_num_threads(1)  # tiny products; threads that wait for each other take five times as long


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("bert"), "bert")
