"""What a startup kit lets a job build, and how long its certificates are valid."""
