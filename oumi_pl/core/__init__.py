"""The names of the Oumi world: its configuration and its trainers, over what oumi_pl does natively."""
