"""ComfyUI's model files and arithmetic as latentmill plugins."""
