"""What a run looks like: progress while it works, tables after it, traces for Perfetto."""
