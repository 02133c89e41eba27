"""The service of gpu_adam.service, by behaviour."""
