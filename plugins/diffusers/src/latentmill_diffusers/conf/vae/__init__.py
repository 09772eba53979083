"""VAEs."""
