"""gpu_adam: tf.keras.optimizers.Adam of TensorFlow 2.0 as CUDA kernels, on NVIDIA GPUs and on the CPU."""

__version__ = "0.1.0"
