"""Runs beside the real frameworks. They need the extra ``parity``; ``python run.py parity`` installs it and runs them."""
