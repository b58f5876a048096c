"""Jobs before they run: made from templates, read back, estimated, simulated, resumed."""
