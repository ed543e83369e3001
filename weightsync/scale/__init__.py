"""The scale model: a cluster of network namespaces behind shaped links that runs the real thing."""
