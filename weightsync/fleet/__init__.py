"""A whole job as processes of one machine, without torch: what measures the product end to end.

Sources and sinks are real members with real executors and fabrics; only their weights are made up.
`calibrate` and `scale` drive it.
"""
