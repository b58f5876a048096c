"""What a site offers to jobs and how far it goes: its file, its policy, its secret."""
