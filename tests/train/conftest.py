"""Puts this folder on the path, so that tests and the processes they start share train_layouts."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# Test files run beside each other: threads that spin would take the cores from one another.
torch.set_num_threads(1)
