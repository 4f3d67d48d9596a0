"""The router: `policy.dispatch` decides, this package carries it out."""
