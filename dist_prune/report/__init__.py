"""What a person sees of runs: tables as text, figures, and self-contained HTML pages."""
