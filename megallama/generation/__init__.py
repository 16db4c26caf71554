"""Text from a model: sampling with a cache of keys and values, for a command, a chat and a server."""
