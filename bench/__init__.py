"""Benchmarks: how fast the operator and the gateway are, on the real API server and the real Envoy of the tests.

`python -m bench` prints a table; with `--write FILE` it also becomes a page with date and machine. Times of requests
are the API server's own (its audit log), so that polling adds nothing to them.
"""
