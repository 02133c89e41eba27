"""Tests of gpu_adam.communicators; operations.py has what every engine must do."""
