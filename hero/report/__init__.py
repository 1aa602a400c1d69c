"""What a run tells people: numbers and files while it goes on, a terminal, and a page to read."""
