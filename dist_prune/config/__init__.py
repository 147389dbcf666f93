"""What a recipe may say, and how it is read from files and the command line. Knows no torch."""
