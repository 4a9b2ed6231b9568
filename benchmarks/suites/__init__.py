"""The suites: a module each, with its `SUITE`."""
