"""Integrations: one module per framework, each imported only where it is used."""

if __name__ != "weightsync.integrations":
    raise ImportError("import weightsync.integrations; integrations/ is mounted there by a symlink")
