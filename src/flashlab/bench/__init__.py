"""How fast and how hungry each attention implementation is on this machine, measured after it was found right."""
