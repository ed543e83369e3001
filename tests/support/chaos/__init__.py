"""Fault runs with real processes: who dies or freezes when, and a watcher that sees the outcome.

`world` says what the weights of a version are, `worker` is what every process runs, `zygote`
starts processes quickly, `watcher` hashes what sinks serve, `run` drives one run.
"""
