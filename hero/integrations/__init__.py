"""The method inside other people's trainers; each module imports the one it serves."""
