import pytest
import torch

# Tiny tensors: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
