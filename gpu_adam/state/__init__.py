"""What an optimizer remembers between steps, and its files."""
