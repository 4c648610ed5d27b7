"""How fast the whole model is, at its real size and with random weights."""
