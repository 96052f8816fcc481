"""Forward, backward, optimizer, schedules, metrics."""
