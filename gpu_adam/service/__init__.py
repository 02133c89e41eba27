"""Optimizers as a service: one process owns parameters and slots, others on the machine push gradients and read.

    README.md      what is promised, the protocol, who may do what
    client.py      connect, Client: a connection
    remote_optimizer.py   RemoteOptimizer, RemoteVariable, Gradients: what a client has of an optimizer
    server.py      the process that owns the device: sockets, messages
    served.py      an optimizer with its variables and checkpoints
    policies.py    when pushes become steps
    sequence.py    whole steps in memory that is being written
    connection.py  a client, as the server knows it
    listener.py    the socket at which clients find a service
    layout.py      where arrays lie in shared memory
    messages.py    the protocol's messages
    config.py      what a service is to own, from a TOML file
    paths.py       where the socket is
    control_plane.py, endpoints.py, answers.py, gatekeeper.py, metrics.py, page.html   the service over HTTP

Memory and events that processes share are the devices' (gpu_adam/devices/sharing.py).
"""

from gpu_adam.errors import ServiceError
from gpu_adam.service.client import Client, connect
from gpu_adam.service.remote_optimizer import Gradients, RemoteOptimizer, RemoteVariable

__all__ = ["Client", "Gradients", "RemoteOptimizer", "RemoteVariable", "ServiceError", "connect"]
