"""Live PyTorch weights of this process: their layout, their addresses, whether they changed.

The only part of the core that imports torch; loaded when a `Source` or `Sink` is made.
"""
