"""The `hero` commands: what each takes and does, and how a command line becomes one of them."""
