"""What `gpu-adam inspect` and `gpu-adam convert` do with checkpoints: nothing here steps, or knows a device.

contents.py says what is in a file, differences.py what distinguishes two, commands.py shows it.
"""
