"""The system: sharding, crashes, long runs, what is around it."""
