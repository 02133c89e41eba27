"""Tests of gpu_adam.distributed."""
