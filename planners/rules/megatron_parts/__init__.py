"""The parts of `rules.megatron`."""
