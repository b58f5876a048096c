"""What a site does with a plan: its own models, data and limits; never nvflare."""

import logging

# bitsandbytes warns while it is imported that it lacks a CPU kernel, which it would fetch from a hub and run.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
