"""From a task and methods to one record for each seed."""
