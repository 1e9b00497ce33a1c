"""A small Hub on this machine, for the tests."""
