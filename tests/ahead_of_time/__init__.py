"""The step as it is compiled for TPU, which needs none; ``python run.py tpu`` starts the tests."""
