"""The system: sharding, crashes, processes, long runs, other libraries around it."""
