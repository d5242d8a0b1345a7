"""Settings of all tests."""

import torch

# The models are tiny: threads cost them more time than they save, many times more on a busy machine.
torch.set_num_threads(1)
