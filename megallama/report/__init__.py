"""`megallama report`: runs as one page for a browser and one picture."""
