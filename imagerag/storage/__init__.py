"""Files, locks and tables, in folders and on object stores. Knows nothing of what is stored."""
