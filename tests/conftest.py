import os

# Tiny tensors: a second thread costs more than it brings, here and in what the tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# The laws on the same few examples each time; `make laws` takes hundreds of random ones, and
# prints how to reproduce what fails.
hypothesis.settings.register_profile("few", derandomize=True, deadline=None, max_examples=5)
hypothesis.settings.register_profile("laws", deadline=None, max_examples=300, print_blob=True)
hypothesis.settings.load_profile("few")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _second_device():
    from tests.software_device import registered

    registered()
