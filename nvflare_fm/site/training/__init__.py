"""One round's training at a site, and its memory."""
