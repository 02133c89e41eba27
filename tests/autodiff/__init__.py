"""Tests of gpu_adam.autodiff, one module for each of its own."""
