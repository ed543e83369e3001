"""Measurements of this machine by the product itself, each beside the ceiling it works under.

`transfer` hosts a run and drives two worker processes, `source` and `sink`, which hold ordinary
tensors and use the engine and the public API as any user would. What must not slow the measurement
down (progress, tables, the job's coordinator) lives in a third process, which sleeps meanwhile.
"""
