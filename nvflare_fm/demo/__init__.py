"""The first minute: a federation of four small hospitals, made up here, on a real encoder."""
