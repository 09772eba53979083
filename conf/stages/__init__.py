"""What the workers of each stage ask for."""
