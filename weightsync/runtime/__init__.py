"""The data plane of one rank: source programs, staging, and the receiving side."""
