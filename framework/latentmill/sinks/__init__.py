"""How shards are stored."""
