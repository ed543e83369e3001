"""Parts of the rule for vLLM: degrees, linear layers, attention, experts, and what is refused."""
