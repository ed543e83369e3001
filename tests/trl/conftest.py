"""Keeps TRL from taking the folder tests/vllm, which is on the path here, for an installed vLLM."""

import sys

sys.modules["vllm"] = None  # type: ignore[assignment]  # what is not there is looked for no further
