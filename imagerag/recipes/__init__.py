"""How the embedded data and weights are made. No other package imports this one, except the command line."""
