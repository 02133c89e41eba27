"""One step, from pairs of gradients and variables to launches of kernels: controller.py is the road."""
