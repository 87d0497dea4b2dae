"""Training: the module with the penalty, its schedules, what is recorded and shown."""
