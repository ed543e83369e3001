"""Parts of the rule for SGLang: degrees, sparse layers, and what is refused."""
