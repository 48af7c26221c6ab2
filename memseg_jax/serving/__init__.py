"""A web page and an HTTP API over one loaded model; `memseg_jax/modes/serve.py` starts it.

A request goes through `app` (what is answered to whom), `bodies` (reading it within limits),
`batcher` (one thread that has the devices) and `engine` (what is computed), and comes back in one
of the `formats`.
"""
