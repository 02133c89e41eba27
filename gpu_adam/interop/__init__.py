"""The state of an optimizer in the words of other libraries: `export_state` and `import_state` for each of them.

    optimizer.load_state_dict(gpu_adam.interop.torch.export_state(adam, variables))
    gpu_adam.interop.torch.import_state(adam, optimizer.state_dict(), variables)

torch.py, keras.py (Keras 3 and tf.keras) and optax.py say how each library lays its state out; exchange.py has what is
common. Arrays cross bit for bit, or not at all. Hyperparameters stay as they are, but for those that torch has in its
state. Where a state would mean something else to the optimizer, an error says what to construct it with. A library is
imported only where its own objects are made.
"""

from gpu_adam.interop import keras, optax, torch

__all__ = ["keras", "optax", "torch"]
