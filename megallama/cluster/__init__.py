"""Jobs of a Slurm cluster: how they are sent, what becomes of them, and a look at their nodes before they train."""
