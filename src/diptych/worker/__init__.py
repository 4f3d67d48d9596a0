"""A worker process: `policy.worker` decides, this package carries it out."""
