"""The workflows: each takes a model and a suite and returns plain results."""
