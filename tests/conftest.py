import os

# Tiny tensors: a second thread costs more than it brings, here and in what the tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
