"""Runs beside the real frameworks, which the extra ``parity`` brings; ``python run.py parity`` starts them."""
