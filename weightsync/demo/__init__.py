"""The demo: real trainers and sharded rollout ranks on one machine, every version proved.

`run` hosts the job and drives the others: `trainer` and `sink` processes use the public API as
any user would, and `verify` reads the weights back without knowing how they were moved.
"""
