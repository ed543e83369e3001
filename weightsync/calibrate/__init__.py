"""`weightsync calibrate`: the constants of this host, as a cluster that `weightsync plan` takes."""
