"""The step as it is compiled for TPU and GPU, which needs neither; ``python run.py aot`` starts the tests."""
