"""A run's folder on disk: complete files, the lock, logs, and which model a name means. No torch."""
