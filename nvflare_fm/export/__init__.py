"""An adapter as a folder that PEFT loads, with its provenance."""
