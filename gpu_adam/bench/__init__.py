"""``gpu-adam bench`` and ``gpu-adam profile``: how fast a step is, how fast it could be, and beside whom.

Reading order: workloads (what is measured) and shapes; inputs; reference (nothing wrong is timed); clocks; own_step and
peers (whose steps); copy_bandwidth and telemetry (the limits); host_costs (Python, first step); runner (all of it, to a
report); tables, figures and page (the report for eyes); ncu; commands (the command line).
"""
