"""Tests of gpu_adam.interop, one module for each library and one for what they have in common."""
