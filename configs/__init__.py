"""Configuration groups that ship with the package; Hydra finds them in a wheel by this file."""

if __name__ != "weightsync.configs":
    raise ImportError("import weightsync.configs; configs/ is mounted there by a symlink")
