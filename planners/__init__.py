"""Planners: from the manifests of both sides to an address-free plan. No torch, no ray."""

if __name__ != "weightsync.planners":
    raise ImportError("import weightsync.planners; planners/ is mounted there by a symlink")
