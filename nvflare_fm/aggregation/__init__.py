"""How many adapters become one: a rule a file, with its promises."""
