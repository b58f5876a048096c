"""What a job says and what follows from it, before anything runs: the server and the sites read it alike."""
