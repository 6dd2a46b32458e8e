"""Runs beside the real frameworks, which the group ``parity`` brings; ``python run.py parity`` starts them."""
