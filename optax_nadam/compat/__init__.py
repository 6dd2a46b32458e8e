"""Other frameworks' Nadams: their constructors, configs and checkpoints, translated by one module each."""
