"""Where jobs are submitted to."""
