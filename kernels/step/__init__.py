"""One token through a whole model as a compiled list of instructions."""
