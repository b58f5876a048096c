"""What happened in a job: the server writes it down, and monitor, `explain` and cards read it. Knows no torch."""
