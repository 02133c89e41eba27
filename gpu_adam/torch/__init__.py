"""Optimizers for PyTorch: torch.optim.Adam and AdamW by the kernels of this package, one launch for all parameters.

    optimizer = gpu_adam.torch.AdamW(model.parameters(), lr=3e-4)

adam.py has the classes, groups.py how parameters are counted, orders.py those that are not contiguous, states.py what
`optimizer.state` shows.
"""

from gpu_adam.torch.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
