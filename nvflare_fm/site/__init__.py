"""What a site does with a plan: its own models, data and limits; never nvflare."""
