"""The demo with real vLLM engines: FSDP2 trainers publish, vLLM generates from what they published.

Needs vLLM in this environment; `scripts/stack vllm -- weightsync demo --engine vllm` brings one.
"""
