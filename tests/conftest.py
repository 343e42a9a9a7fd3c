"""One thread in each of pytest's two processes (pyproject.toml): the tensors are small, and runs in here agree bit for
bit with those of the subprocesses that tests/test_scripts.py starts."""

import torch

torch.set_num_threads(1)
