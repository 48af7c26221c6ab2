"""One command that measures everything on the accelerator at hand: docs/accelerator.md."""
