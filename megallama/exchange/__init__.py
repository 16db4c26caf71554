"""The doors for models: `megallama export` and `megallama import`."""
